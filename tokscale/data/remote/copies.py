"""Local copies of what lies behind addresses: made once a machine, in parts, and bound in size together.

A copy's name is a hash of its address, size and tag, so that another content is another copy. Whole files grow in a
hidden one, which whoever comes next continues. What is removed to make room stays readable to whoever has it open.
"""

import hashlib
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from tokscale.base.address import Address
from tokscale.base.errors import TokscaleError
from tokscale.base.files import storage_errors
from tokscale.base.flock import EXCLUSIVE, try_lock
from tokscale.base.log import logger
from tokscale.data.remote.config import RemoteConfig
from tokscale.data.remote.transport import Facts, Transport

log = logger("data")
_PART = 8 << 20
"""Bytes that one request of a whole file asks for."""
_LOOK_EVERY = 16
"""The folder is measured when a process has added this part of what it may hold."""
_STRIPES = 256
"""Locks; who makes different copies seldom meets at one."""
_WHOLE, _PARTIAL = "whole", "partial"
_ABANDONED = 3600.0
"""Seconds after which nobody writes a partial copy any more that has not grown."""


class Copies:
    """The copies in one folder, for any number of threads and processes."""

    def __init__(self, config: RemoteConfig, transport: Transport | None = None):
        self.config, self.transport = config, transport or Transport(config)
        self.folder = config.cache_folder
        self._limit = int(config.cache_gb * 1e9)
        self._added = self._limit  # what others left is measured with the first copy
        self._lock = threading.Lock()

    def open(self, place: Address, facts: Facts) -> int:
        """A descriptor of a whole file's copy.

        Raises:
            DataError, StorageError, EnvironmentRefused: As for `Transport.facts`; also when the copy finds no room.
        """
        path = self._path(place, facts, _WHOLE)
        while True:
            if (found := _opened(path, facts.size)) is not None:
                return found
            with storage_errors(self.folder):
                with self._alone(path) as shared:
                    if (found := _opened(path, facts.size)) is None:
                        self._download(place, facts, path, shared)
                        found = _opened(path, facts.size)
                self._make_room(facts.size)
            if found is not None:  # else another process needed the room already
                return found

    def read(self, place: Address, facts: Facts, offset: int, size: int) -> bytes:
        """Some bytes of a file, from their copy or from afar.

        Raises:
            DataError, StorageError, EnvironmentRefused: As for `Transport.read`.
        """
        path = self._path(place, facts, f"{offset}-{size}")
        if (data := _bytes(path, size)) is not None:
            return data
        try:
            with self._alone(path):
                if (data := _bytes(path, size)) is None:
                    data = self.transport.read(place, offset, offset + size)
                    _put(path, data)
            self._make_room(size)
        except OSError as error:  # a full disk costs the copy only
            log.warning("%s: keeps no copies (%s)", self.folder, error)
            data = data if data is not None else self.transport.read(place, offset, offset + size)
        return data

    def forget(self, place: Address, facts: Facts, offset: int, size: int) -> None:
        """Remove the copy of some bytes that turned out wrong."""
        self._path(place, facts, f"{offset}-{size}").unlink(missing_ok=True)

    def mirror(self, folder: Address) -> Path:
        """Where small files of a folder are kept as they are named; beside the bound."""
        return self.folder / "folders" / hashlib.sha256(folder.rstrip("/").encode()).hexdigest()[:32]

    def _path(self, place: Address, facts: Facts, part: str) -> Path:
        name = hashlib.sha256("\n".join((place, str(facts.size), facts.tag)).encode()).hexdigest()
        return self.folder / "copies" / name[:2] / f"{name[2:32]}.{part}"

    @contextmanager
    def _alone(self, path: Path) -> Iterator[bool]:
        """One maker of a copy at a time; False where the file system has no locks and everyone makes their own."""
        stripe = int(hashlib.sha256(os.fsencode(path)).hexdigest(), 16) % _STRIPES
        lock = self.folder / "locks" / f"{'whole' if path.suffix == f'.{_WHOLE}' else 'part'}-{stripe}"
        lock.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "a") as file:
            yield try_lock(file, EXCLUSIVE, wait=True) is not None

    def _download(self, place: Address, facts: Facts, path: Path, shared: bool) -> None:
        partial = path.with_suffix(f".{_PARTIAL}" if shared else f".{secrets.token_hex(6)}.{_PARTIAL}")
        with open(partial, "ab") as file, ThreadPoolExecutor(self.config.connections) as pool:
            file.truncate(min(file.tell(), facts.size))
            at = file.seek(0, os.SEEK_END)
            if at:
                log.info("%s: goes on at byte %d of %d", place, at, facts.size)
            starts = iter(range(at, facts.size, _PART))
            take = lambda start: pool.submit(  # noqa: E731
                self.transport.read, place, start, min(start + _PART, facts.size)
            )
            ahead = deque(take(start) for start in islice(starts, self.config.connections))
            try:
                while ahead:
                    data = ahead.popleft().result()
                    ahead += [take(start) for start in (next(starts, None),) if start is not None]
                    file.write(data)
                    file.flush()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            os.fsync(file.fileno())
            assert file.tell() == facts.size, "parts follow each other to the end"
        if self.transport.facts(place) != facts:
            partial.unlink()
            raise ConnectionAbortedError(f"{place}: was replaced while it was read")
        os.replace(partial, path)

    def _make_room(self, added: int) -> None:
        with self._lock:
            self._added += added
            if self._added < self._limit // _LOOK_EVERY:
                return
            self._added = 0
        copies = sorted(_copies(self.folder / "copies"))
        held = sum(size for _, size, _ in copies)
        for _, size, path in copies:
            if held <= self._limit - self._limit // _LOOK_EVERY:
                break
            path.unlink(missing_ok=True)
            held -= size

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])


class Ahead:
    """Does what will be wanted soon, on threads for which nobody waits; failures are left to whoever needs it."""

    def __init__(self, threads: int):
        self._waiting: deque[Callable[[], object]] = deque()
        self._threads, self._idle = threads, 0
        self._lock = threading.Lock()

    def add(self, calls: list[Callable[[], object]]) -> None:
        """Do these, in order, after what waits already."""
        with self._lock:
            self._waiting.extend(calls)
            fresh = min(self._threads, len(calls))
            self._threads -= fresh
        for _ in range(fresh):
            threading.Thread(target=self._work, name="read ahead", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads += 1
                    return
                call = self._waiting.popleft()
            with suppress(TokscaleError, OSError):
                call()


def _opened(path: Path, size: int) -> int | None:
    """A descriptor of a copy that is whole; None when there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != size:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        return None
    with suppress(OSError):
        os.utime(path)  # the last used is the last to make room
    return descriptor


def _bytes(path: Path, size: int) -> bytes | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return data if len(data) == size else None


def _put(path: Path, data: bytes) -> None:
    # Not durable: what a crash leaves has another length, or fails its reader's checksum and is forgotten.
    partial = path.with_suffix(f".{secrets.token_hex(6)}.{_PARTIAL}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _copies(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When each copy was used last, its size and its path; not those that grow."""
    now = time.time()
    for part in os.scandir(folder) if folder.is_dir() else ():
        for entry in os.scandir(part.path):
            with suppress(FileNotFoundError):  # removed meanwhile
                about = entry.stat()
                if not (entry.name.endswith(_PARTIAL) and about.st_mtime > now - _ABANDONED):
                    yield about.st_mtime, about.st_size, Path(entry.path)
