"""The files of a data set, wherever it lies: shards read by place, small files as a whole."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

from tokscale.base.address import Address
from tokscale.base.errors import DataError
from tokscale.base.files import atomic_write, open_regular
from tokscale.data.remote.config import RemoteConfig
from tokscale.data.remote.copies import Ahead, Copies
from tokscale.data.remote.transport import Facts

_OPEN_FILES = 64


class DataFiles(Protocol):
    """Files by their names within one data set. Safe to use from several threads; sent to other ranks as its place."""

    def read(self, name: str, offset: int, size: int, checksum: int | None = None) -> bytes:
        """Bytes of a shard, fewer where it ends before; `checksum` lets a local copy that is not right be made again.

        Raises:
            DataError: When there is no such file.
        """
        ...

    def expect(self, places: Sequence[tuple[str, int, int]]) -> None:
        """Begin to fetch what `read` will be asked for: name, offset and size of each."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            DataError: When there is none.
        """
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        ...

    def small(self, name: str) -> Path:
        """A whole small file on this machine; where it would be, if a data set of this machine has none.

        Raises:
            DataError: When a data set behind an address has none.
        """
        ...

    def beside(self, name: str) -> Path:
        """Where something that was found out of the data set may be kept."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


class LocalFiles:
    """In a folder of this machine."""

    def __init__(self, folder: Path, again: str):
        """`again` says to a person how a missing shard is made again."""
        self._folder, self._again = folder, again
        self._open: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, offset: int, size: int, checksum: int | None = None) -> bytes:
        """See `DataFiles`."""
        with self._lock:  # so that no other thread closes the file meanwhile
            return os.pread(self._descriptor(name), size, offset)

    def expect(self, places: Sequence[tuple[str, int, int]]) -> None:
        """The kernel reads ahead."""

    def size(self, name: str) -> int:
        """See `DataFiles`."""
        try:
            return (self._folder / name).stat().st_size
        except FileNotFoundError:
            raise DataError(f"{self._folder / name}: no such file; {self._again}") from None

    def has(self, name: str) -> bool:
        """See `DataFiles`."""
        return (self._folder / name).exists()

    def small(self, name: str) -> Path:
        """See `DataFiles`."""
        return self._folder / name

    beside = small

    def close(self) -> None:
        """See `DataFiles`."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def _descriptor(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        if len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        try:
            self._open[name] = open_regular(self._folder / name)
        except DataError as error:
            raise DataError(f"{error}, so the shard is missing; {self._again}") from None
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self._folder, "again": self._again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["again"])

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


class RemoteFiles:
    """Behind an address, with local copies of what was read."""

    def __init__(self, folder: Address, config: RemoteConfig):
        self._folder, self._config = folder, config
        self._copies, self._ahead = Copies(config), Ahead(config.connections)
        self._facts: dict[str, Facts] = {}
        self._mirrored: set[str] = set()

    def read(self, name: str, offset: int, size: int, checksum: int | None = None) -> bytes:
        """See `DataFiles`."""
        place, facts = self._folder / name, self._facts_of(name)
        size = max(0, min(size, facts.size - offset))
        data = self._copies.read(place, facts, offset, size)
        if checksum is None or crc32(data) == checksum:
            return data
        self._copies.forget(place, facts, offset, size)
        return self._copies.read(place, facts, offset, size)

    def expect(self, places: Sequence[tuple[str, int, int]]) -> None:
        """See `DataFiles`."""
        self._ahead.add([lambda at=at: self.read(*at) for at in places])

    def size(self, name: str) -> int:
        """See `DataFiles`."""
        return self._facts_of(name).size

    def has(self, name: str) -> bool:
        """See `DataFiles`."""
        try:
            self._facts_of(name)
        except DataError:
            return False
        return True

    def small(self, name: str) -> Path:
        """See `DataFiles`; asked for anew by each process that opens the data set."""
        path = self.beside(name)
        if name not in self._mirrored:
            place, facts = self._folder / name, self._facts_of(name)
            data = self._copies.transport.read(place, 0, facts.size)
            with atomic_write(path) as file:
                file.write(data)
            self._mirrored.add(name)
        return path

    def beside(self, name: str) -> Path:
        """See `DataFiles`."""
        return self._copies.mirror(self._folder) / name

    def close(self) -> None:
        """See `DataFiles`."""

    def _facts_of(self, name: str) -> Facts:
        if name not in self._facts:
            self._facts[name] = self._copies.transport.facts(self._folder / name)
        return self._facts[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self._folder, "config": self._config, "facts": self._facts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["config"])
        self._facts = state["facts"]


def files_of(folder: Path | str, config: RemoteConfig, again: str) -> DataFiles:
    """The files of a data set."""
    return RemoteFiles(folder, config) if isinstance(folder, Address) else LocalFiles(Path(folder), again)
