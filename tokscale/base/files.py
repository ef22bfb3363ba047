"""Files that are either whole or not there."""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tokscale.base.errors import DataError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Turn the file system's refusals into `StorageError` (exit 74) that names the path and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        advice = "free space or choose another folder" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check it"
        raise StorageError(f"{path}: {os.strerror(error.errno)}; {advice}, then run the same command again") from error


@contextmanager
def atomic_write(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only when the block ends without an exception, and then durably."""
    path = Path(path)
    # Processes on other machines may have the same number.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left half written in a folder; for when nobody writes there any more."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        DataError: When it is missing or not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); it was damaged or is not what its name says") from None


def fsync_folder(folder: Path | str) -> None:
    """Make renames and new names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path | str) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
