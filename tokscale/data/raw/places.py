"""Where raw shards lie: a folder of this machine, or an address; either lists its shards and opens them by name."""

import hashlib
import threading
from pathlib import Path
from typing import Protocol

from tokscale.base.address import Address
from tokscale.base.errors import DataError
from tokscale.data.raw.shards import (
    MANIFEST,
    SHARD_ENDINGS,
    RawManifest,
    RawShard,
    in_order,
    read_raw_manifest,
    shard_paths,
)
from tokscale.data.remote.config import RemoteConfig
from tokscale.data.remote.copies import Ahead, Copies
from tokscale.data.remote.pattern import expand, is_pattern
from tokscale.data.remote.transport import Facts
from tokscale.data.tokens.files import RemoteFiles

STATS = "_stats.json"
"""Ending of img2dataset's record of a shard, its last act for it."""


class RawPlace(Protocol):
    """Raw shards by their names from one folder on."""

    def names(self) -> list[str]:
        """The shards, in order; looked up anew.

        Raises:
            DataError: When there are none.
        """
        ...

    def hidden(self) -> list[str]:
        """Shards by their ending that are none by their name."""
        ...

    def stats(self) -> dict[str, Path]:
        """The records that shards' makers left, by the shards' names without ending."""
        ...

    def manifest(self) -> RawManifest | None:
        """What `prepare` left, where it made them."""
        ...

    def seen(self, name: str) -> tuple[int, int]:
        """Bytes of a shard, and a number that changes with its content; zeros when there is none."""
        ...

    def tag(self, name: str) -> str:
        """What a store says of a shard's content; empty on this machine."""
        ...

    def open(self, name: str) -> RawShard:
        """A shard.

        Raises:
            DataError: When it is missing or damaged.
        """
        ...

    def expect(self, name: str) -> None:
        """Begin to fetch what will be opened next."""
        ...


class LocalRaw:
    """A folder of this machine."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def names(self) -> list[str]:
        """See `RawPlace`."""
        return [path.relative_to(self._folder).as_posix() for path in shard_paths(self._folder)]

    def hidden(self) -> list[str]:
        """See `RawPlace`."""
        return sorted(path.name for path in self._folder.glob(".*") if path.name.endswith(SHARD_ENDINGS))

    def stats(self) -> dict[str, Path]:
        """See `RawPlace`."""
        found = self._folder.rglob(f"*{STATS}")
        return {path.relative_to(self._folder).as_posix().removesuffix(STATS): path for path in found}

    def manifest(self) -> RawManifest | None:
        """See `RawPlace`."""
        return read_raw_manifest(self._folder)

    def seen(self, name: str) -> tuple[int, int]:
        """See `RawPlace`; the number is the time of writing."""
        try:
            found = (self._folder / name).stat()
        except OSError:
            return 0, 0
        return found.st_size, found.st_mtime_ns

    def tag(self, name: str) -> str:
        """See `RawPlace`."""
        return ""

    def open(self, name: str) -> RawShard:
        """See `RawPlace`."""
        return RawShard(self._folder / name)

    def expect(self, name: str) -> None:
        """The kernel reads ahead."""


class RemoteRaw:
    """An address: of a folder that is listed, or a pattern that names each shard."""

    def __init__(self, place: Address, config: RemoteConfig):
        self._place = place
        self._folder, self._patterned = expand(place) if is_pattern(place) else (place, None)
        self._files, self._copies, self._ahead = RemoteFiles(self._folder, config), Copies(config), Ahead(1)
        self._facts: dict[str, Facts | None] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return self._place

    def names(self) -> list[str]:
        """See `RawPlace`."""
        transport = self._copies.transport
        found = transport.listing(self._folder) if self._patterned is None else dict.fromkeys(self._patterned)
        names = in_order(found) if self._patterned is None else self._patterned
        if not names:
            raise DataError(
                f"{self._folder}: lists no raw shards ({', '.join(f'*{e}' for e in SHARD_ENDINGS)}); name the folder "
                "that holds them, or each of them by a pattern: raw='https://host/{00000..00099}.tar'"
            )
        unknown = [name for name in names if found[name] is None]
        found |= dict(zip(unknown, transport.facts_of([self._folder / name for name in unknown]), strict=True))
        with self._lock:
            self._facts = found
        return names

    def hidden(self) -> list[str]:
        """See `RawPlace`."""
        return []

    def stats(self) -> dict[str, Path]:
        """See `RawPlace`; those that a listing shows."""
        names = [name for name in self._facts if name.endswith(STATS)]
        return {name.removesuffix(STATS): self._files.small(name) for name in names}

    def manifest(self) -> RawManifest | None:
        """See `RawPlace`."""
        if self._patterned is not None or not self._files.has(MANIFEST):
            return None
        return read_raw_manifest(self._files.small(MANIFEST).parent)

    def seen(self, name: str) -> tuple[int, int]:
        """See `RawPlace`; as last listed or opened."""
        facts = self._known(name)
        if facts is None:
            return 0, 0
        return facts.size, int.from_bytes(hashlib.sha256(facts.tag.encode()).digest()[:7])

    def tag(self, name: str) -> str:
        """See `RawPlace`; as last listed or opened."""
        facts = self._known(name)
        return facts.tag if facts else ""

    def open(self, name: str) -> RawShard:
        """See `RawPlace`; reads the whole shard, or its copy."""
        place, facts = self._folder / name, self._look(name)
        if facts is None:
            raise DataError(f"{place}: there is no such shard; check the address")
        return RawShard(place, self._copies.open(place, facts))

    def expect(self, name: str) -> None:
        """See `RawPlace`."""
        self._ahead.add([lambda: self.open(name).close()])

    def _known(self, name: str) -> Facts | None:
        with self._lock:
            if name in self._facts:
                return self._facts[name]
        return self._look(name)

    def _look(self, name: str) -> Facts | None:
        (facts,) = self._copies.transport.facts_of([self._folder / name])
        with self._lock:
            self._facts[name] = facts
        return facts


def raw_place(place: Path | str, config: RemoteConfig) -> RawPlace:
    """Where raw shards lie."""
    return RemoteRaw(place, config) if isinstance(place, Address) else LocalRaw(Path(place))
