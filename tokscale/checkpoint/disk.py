"""The file system as the commit protocol uses it: one small method per system call.

Everything that makes a checkpoint durable goes through one `Disk`, so that tests can kill the process, fill the disk or
fail a rename between any two calls.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokscale.base.errors import StorageError
from tokscale.base.files import refusal_of


class Disk:
    """Durable writing. Each method is one system call, or a loop over one."""

    def make_folder(self, path: Path) -> None:
        """Create one folder; it may be there already, since another rank may have come first."""
        path.mkdir(exist_ok=True)

    def create(self, path: Path) -> int:
        """Open a new file for writing and return its descriptor; an existing file is an error."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: memoryview) -> None:
        """Append all of `data`."""
        while data:
            data = data[os.write(descriptor, data) :]

    def begin_sync(self, descriptor: int, start: int, length: int) -> None:
        """Let the medium begin with a range just written, while more is prepared. A hint, which promises nothing."""
        # Pages that wait to be written are not dropped by this advice, but their writing is begun.
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)

    def sync(self, descriptor: int) -> None:
        """Wait until the file's bytes are on the medium."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor of `create`."""
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder its new name in one step."""
        os.rename(source, target)

    def replace(self, source: Path, target: Path) -> None:
        """As `rename`, over an existing file."""
        os.replace(source, target)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove_file(self, path: Path) -> None:
        """Delete a file."""
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        """Delete an empty folder."""
        os.rmdir(path)


def remove_tree(disk: Disk, path: Path) -> None:
    """Delete a folder and all below it. Of a link, here or below, only the link goes."""
    if path.is_symlink():
        disk.remove_file(path)
        return
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            remove_tree(disk, entry)
        else:
            disk.remove_file(entry)
    disk.remove_folder(path)


def write_file(disk: Disk, path: Path, data: bytes) -> None:
    """Write a small new file and make its bytes durable."""
    descriptor = disk.create(path)
    try:
        disk.write(descriptor, memoryview(data))
        disk.sync(descriptor)
    finally:
        disk.close(descriptor)


@contextmanager
def refusals(path: Path, loss: str = "this save is lost, earlier checkpoints are intact") -> Iterator[None]:
    """Turn whatever the file system refuses into `StorageError` (exit 74) that names the path and what is lost.

    Wider than `base.files.storage_errors`: while a checkpoint is written every error of the file system, a stale handle
    as well as a full disk, means that this save is lost and the earlier ones are not.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise StorageError(
            f"{where}: {refusal_of(error)}; {loss}; mend or free the storage and run the same command again"
        ) from error
