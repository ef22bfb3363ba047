"""Files that are either whole or not there."""

import errno
import hashlib
import itertools
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tokscale.base.errors import DataError, StorageError, TokscaleError

_WAYS_OUT = {
    errno.ENOSPC: "free space or choose another folder",
    errno.EDQUOT: "free space or choose another folder",
    errno.EFBIG: "choose a folder on a file system that takes larger files",
    errno.EROFS: "choose a folder that may be written to",
    errno.EACCES: "get the right to it from its owner, or choose another folder",
    errno.EPERM: "get the right to it from its owner, or choose another folder",
    errno.ENOENT: "check the path, or make what is missing",
    errno.ENOTDIR: "a part of the path is a file where a folder is wanted: check the path",
    errno.EISDIR: "a folder is where a file is wanted: check the path",
    errno.EEXIST: "something else has that name: move it away, or choose another path",
    errno.ENOTEMPTY: "something else is there: move it away, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "its links lead in a circle: mend them, or choose another path",
    errno.ESTALE: "the file server has replaced it meanwhile",
    errno.EIO: "the medium or its server has failed: check it, or choose another folder",
    errno.ENXIO: "no device is behind it: check the path",
    errno.ENODEV: "no device is behind it: check the path",
    errno.EBUSY: "something else uses it: wait for that, or choose another path",
    errno.EXDEV: "the two lie on different file systems: choose paths on one",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files: close some",
}
"""By error number: what a person can do."""


def way_out(number: int) -> str | None:
    """What to do about an error of the file system; None when the number does not stand for one."""
    return _WAYS_OUT.get(number)


_EFFECTIVE = os.access in os.supports_effective_ids
_DEEPEST = 100
"""Levels of objects and lists in a JSON file; what reads them goes down by recursion."""


def refusal_of(error: OSError) -> str:
    """What the file system said. An error without a number has words alone: `strerror(0)` would be "Success"."""
    return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__


def may_write(path: Path | str) -> bool:
    """Whether something can be made below a folder, which need not be there yet, or written over a file."""
    there = path = Path(os.path.abspath(path))
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return there == path and os.access(path, os.W_OK, effective_ids=_EFFECTIVE)
    return os.access(there, os.W_OK | os.X_OK, effective_ids=_EFFECTIVE)


def require_writable(path: Path | str, way_out: str) -> None:
    """Ask before the work, not after it, whether what it makes can be kept.

    Args:
        path: Folder that is to hold it, or file.
        way_out: What a person can do instead.

    Raises:
        StorageError: When it cannot; the file system may still refuse later.
    """
    if not may_write(path):
        raise StorageError(f"{path}: may only be read, so nothing can be kept there; {way_out}")


_PARTIAL = ".partial"
"""Ends the names of files in the making, which nobody asked for and nobody shall be told of."""


@contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Turn the file system's refusals into `StorageError` (exit 74) that names the path and what to do.

    Args:
        path: Named where the error does not say itself which file it met, or says that of a file in the making.
    """
    try:
        yield
    except OSError as error:
        advice = way_out(error.errno or 0)
        if advice is None or (error.errno == errno.ENOENT and error.filename is None):
            raise  # no affair of a file: what the system does not find it names
        said = error.filename if isinstance(error.filename, str | os.PathLike) else path
        where = path if str(said).endswith(_PARTIAL) else said
        if error.errno == errno.EEXIST and os.path.islink(where) and not os.path.exists(where):
            advice = f"it is a link to {os.readlink(where)}, which is not there: make that, or remove the link"
        message = f"{where}: {refusal_of(error)}; {advice}, then run the same command again"
        raise StorageError(message) from error


@contextmanager
def atomic_write(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only when the block ends without an exception, and then durably."""
    path = Path(path)
    # Processes on other machines may have the same number.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}{_PARTIAL}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):  # what went wrong first is what is told
                partial.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left half written in a folder; for when nobody writes there any more."""
    for path in folder.glob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def new_folder(path: Path | str) -> Path:
    """Make a folder that was not there: under `path`, or under `path.01`, `path.02`, ... where others took it before.

    For names made of the time, which two processes, or one in a hurry, may ask for in the same second.
    """
    path = Path(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            taken = path if number == 1 else path.with_name(f"{path.name}.{number - 1:02d}")
            try:
                taken.mkdir()
            except FileExistsError:
                continue
            return taken
    raise AssertionError


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")


def read_json(path: Path | str, *, refuse: type[TokscaleError] = DataError) -> dict[str, Any]:
    """Read a JSON file that holds an object, as nearly all of ours do.

    Args:
        path: Of a regular file.
        refuse: Raised, naming the path, when it is missing, is not JSON, or holds anything else.
    """
    values = _json_in(path, refuse)
    if not isinstance(values, dict):
        raise refuse(f"{path}: holds a {type(values).__name__} in place of an object; it was damaged or edited")
    return values


def read_json_texts(path: Path | str, *, refuse: type[TokscaleError] = DataError) -> list[str]:
    """Read a JSON file that holds a list of texts, such as names of classes.

    Args:
        path: Of a regular file.
        refuse: As for `read_json`.
    """
    values = _json_in(path, refuse)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise refuse(f"{path}: is no list of texts; it was damaged or edited")
    return values


def _json_in(path: Path | str, refuse: type[TokscaleError]) -> Any:
    try:
        values = parse_json(read_regular(path, refuse=refuse))
    except ValueError as error:
        raise refuse(f"{path}: not valid JSON ({error}); it was damaged or is not what its name says") from None
    if _deeper_than(_DEEPEST, values):
        raise refuse(f"{path}: nests deeper than {_DEEPEST} levels; it was damaged or edited")
    return values


def row_of(line: str, *keys: str) -> dict[str, Any] | None:
    """The object in a line of a file that grows line by line.

    Args:
        line: Of the file.
        keys: That the object must have.

    Returns:
        None for a line that a kill has torn, or that somebody wrote: no JSON, no object, or without one of `keys`.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and all(key in values for key in keys) else None


@contextmanager
def as_written(path: Path | str, *, refuse: type[TokscaleError] = DataError) -> Iterator[None]:
    """Inside, values are taken out of a file of ours; if they are not what we write there, `refuse` names its path."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {error}"[:300]
        raise refuse(f"{path}: is not what tokscale writes there ({what}); it was damaged or edited") from error


def parse_json(data: bytes | bytearray | str) -> Any:
    """Decode JSON that anyone may have written.

    Raises:
        ValueError: When it is no JSON in UTF-8, nests too deep, has a number of more digits than Python converts, or
            says NaN or infinity, which JSON does not have.
    """
    text = data if isinstance(data, str) else bytes(data).decode("utf-8-sig")
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nests too deep") from None


def _deeper_than(levels: int, value: Any) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [
            below
            for entry in layer
            if isinstance(entry, dict | list)
            for below in (entry.values() if isinstance(entry, dict) else entry)
            if isinstance(below, dict | list)
        ]
        if not layer:
            return False
    return True


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:40]} is beyond what a number holds")
    return value


def fsync_folder(folder: Path | str) -> None:
    """Make renames and new names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path | str, *, refuse: type[TokscaleError] = DataError) -> int:
    """A descriptor of a regular file, or of one that a link names; nothing waits for a pipe's other end.

    Args:
        path: Of the file.
        refuse: Raised when there is none: missing, a link to nothing, a pipe, a socket, a device, a folder.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        what = "a link to a file that is not there" if os.path.islink(path) else "no such file"
        raise refuse(f"{path}: {what}") from None
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV, errno.ELOOP, errno.EISDIR):
            raise refuse(f"{path}: not a file ({error.strerror})") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise refuse(f"{path}: not a file, but a folder, a pipe, a socket or a device")
    return descriptor


def read_regular(path: Path | str, *, refuse: type[TokscaleError] = DataError) -> bytes:
    """The bytes of a regular file; what has no end, or waits for somebody, is refused as by `open_regular`."""
    with open(open_regular(path, refuse=refuse), "rb") as file:
        return file.read()


def sha256_file(path: Path | str) -> str:
    """Hex sha256 of a regular file's bytes.

    Raises:
        DataError: When it is no such file.
    """
    with open(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
