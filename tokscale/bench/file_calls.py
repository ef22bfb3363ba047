"""Counts what a process asks of the file system below some folders: openings, looks, names made."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OPENS = ("open", "os.listdir", "os.scandir")
_LOOKS = ("stat", "lstat", "access")
_WRITES = ("link", "rename", "replace", "unlink", "mkdir", "utime")
_counting: list["FileCalls"] = []


class FileCalls(Counter[str]):
    """Calls by kind: `opens` (listing a folder is one), `stats`, `writes` (names that are made, moved or removed)."""

    def __init__(self, folders: Sequence[Path]):
        super().__init__()
        self._folders = tuple(str(folder) for folder in folders)

    def add(self, kind: str, path: object) -> None:
        """One call, if it is about something below the folders."""
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(self._folders):
            self[kind] += 1


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if _counting and event in _OPENS:
        for calls in _counting:
            calls.add("opens", arguments[0])


@contextmanager
def count_file_calls(*folders: Path) -> Iterator[FileCalls]:
    """Count inside the context, over all threads of this process. What C libraries ask by themselves is not seen."""
    if not hasattr(sys, "_tokscale_counts"):  # an audit hook stays for as long as the process
        sys.addaudithook(_heard)
        sys._tokscale_counts = True  # pyright: ignore[reportAttributeAccessIssue]
    calls = FileCalls(folders)
    real = {name: getattr(os, name) for name in (*_LOOKS, *_WRITES)}

    def watched(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.add(kind, arguments[0] if arguments else None)
            return function(*arguments, **options)

        return call

    for name, function in real.items():
        setattr(os, name, watched("stats" if name in _LOOKS else "writes", function))
    _counting.append(calls)
    try:
        yield calls
    finally:
        _counting.remove(calls)
        for name, function in real.items():
            setattr(os, name, function)
