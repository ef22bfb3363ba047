"""Tar files to their end mark, compressed by gzip or not."""

import gzip
import os
import shlex
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tokscale.base.errors import DataError, StorageError
from tokscale.base.files import refusal_of

_GZIP = b"\x1f\x8b"
_END_MARK = 2 * tarfile.BLOCKSIZE
_RECORDS = tuple(tarfile.BLOCKSIZE << power for power in range(6, 12))
"""Bytes that tars are filled up to a multiple of by `tar -b 64` to `-b 2048`, as tapes and object stores want them."""


def is_gzip(descriptor: int) -> bool:
    """Whether an open file is one that gzip made, whatever its name."""
    return os.pread(descriptor, len(_GZIP), 0) == _GZIP


def unpacked(descriptor: int, path: Path | str) -> int:
    """A descriptor of what a gzip file holds, in a file without a name; takes the place of the given one."""
    with open(descriptor, "rb") as packed, tempfile.TemporaryFile() as plain:
        packed.seek(0)
        try:
            with gzip.GzipFile(fileobj=packed) as file:
                shutil.copyfileobj(file, plain, 1 << 20)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: its gzip stream is damaged or cut off ({error}); copy or make it again") from None
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be unpacked into {tempfile.gettempdir()} ({refusal_of(error)}); free space there, or "
                "name another folder by the environment's TMPDIR"
            ) from None
        plain.seek(0)  # a copy of a descriptor goes on where the first one is
        return os.dup(plain.fileno())


def walk(file: IO[bytes], path: Path | str) -> list[tarfile.TarInfo]:
    """All members of a tar, only if it is whole."""
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            members = list(tar)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a tar, or damaged or truncated ({error}); copy or make it again") from None
    # tarfile takes whatever is no valid header for the end, so look whether the end mark is really there.
    blocks = [-(-member.size // tarfile.BLOCKSIZE) if member.isreg() else 0 for member in members]
    end = max((m.offset_data + n * tarfile.BLOCKSIZE for m, n in zip(members, blocks, strict=True)), default=0)
    if size < end + _END_MARK:
        raise DataError(f"{path}: truncated: {size} bytes without the end mark that should be at {end}; make it again")
    _require_end(file, path, end, size, [member for member in members if member.isreg() and member.size])
    return members


def _require_end(file: IO[bytes], path: Path | str, end: int, size: int, members: Sequence[tarfile.TarInfo]) -> None:
    """Refuse a tar that goes on after its end, or whose zeros stand where members were."""
    file.seek(end)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise DataError(
                f"{path}: no valid header at byte {end}, and not the end either: the shard is damaged there"
            )
    if size <= -(-(end + _END_MARK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE:
        return
    # Whoever copies into a file that was made long enough first leaves zeros after a cut, which mostly cuts a member.
    filled = any(size % record == 0 and size - end - _END_MARK < record for record in _RECORDS)
    if not (filled and members and _last_bytes(file, members[-1]).strip(b"\0")):
        raise DataError(
            f"{path}: {size - end} zero bytes follow where it ends, at byte {end}, more than any end mark has: what "
            f"stood there is lost; make it again, or, if nothing did, cut them off: truncate -s {end + _END_MARK} "
            f"{shlex.quote(str(path))}"
        )


def _last_bytes(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    length = min(member.size, 16)
    file.seek(member.offset_data + member.size - length)
    return file.read(length)
