"""What a test of durability watches: the order of the calls that put bytes and names on the medium.

A killed process never loses the page cache, so killing cannot tell whether a file was synced; the order of calls can.
"""

import os
from pathlib import Path
from typing import Any

import pytest


class Calls(list[tuple[str, Any]]):
    """`("create", name)`, `("fsync", inode)`, `("rename", new name)` in their order."""

    def synced(self, path: Path, after: int = 0) -> int:
        """Where a file or folder was synced first, from the call numbered `after` on; ValueError where never."""
        return self.index(("fsync", path.stat().st_ino), after)


def record_calls(patch: pytest.MonkeyPatch) -> Calls:
    """From here on, every creation, sync and renaming of this process is written down."""
    calls = Calls()

    def watched(name: str, entry: Any) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            if (said := entry(*arguments)) is not None:
                calls.append(said)
            return result

        patch.setattr(os, name, call)

    watched("fsync", lambda descriptor: ("fsync", os.fstat(descriptor).st_ino))
    watched("open", lambda path, flags, *_: ("create", Path(path).name) if flags & os.O_CREAT else None)
    watched("rename", lambda source, target: ("rename", Path(target).name))
    watched("replace", lambda source, target: ("rename", Path(target).name))
    return calls
