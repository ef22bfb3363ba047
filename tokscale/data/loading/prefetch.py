"""One thread that works ahead, never further than a bound."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class _End:
    pass


class Prefetcher(Generic[T]):
    """An iterator that a thread keeps `depth` items ahead of its reader.

    An exception of the source is raised where its item would have been. A depth of 0 means no thread.
    """

    def __init__(self, source: Iterator[T], depth: int, name: str = "prefetch"):
        self._source, self._depth = source, depth
        self._queue: queue.Queue[T | _Failure | _End] = queue.Queue(max(depth, 1))
        self._stop = threading.Event()
        self._over = False
        # A daemon: a reader that dies must not leave a process that waits for its prefetcher.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        if depth:
            self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._depth:
            return next(self._source)
        if self._over:
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, _End):
            self._over = True
            raise StopIteration
        if isinstance(item, _Failure):
            self._over = True
            raise item.error
        return item

    @property
    def ready(self) -> int:
        """Items that wait for the reader."""
        return self._queue.qsize()

    def close(self) -> None:
        """Stop the thread and wait for it; items made ahead are lost."""
        self._over = True
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.02)
            except queue.Empty:
                continue

    def _work(self) -> None:
        try:
            for item in self._source:
                self._queue.put(item)
                if self._stop.is_set():
                    return
            self._queue.put(_End())
        except BaseException as error:  # handed to the reader
            self._queue.put(_Failure(error))
