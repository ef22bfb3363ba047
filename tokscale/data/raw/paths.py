"""Which names are data, and opening them without waiting for what is no file."""

import errno
import os
import stat
from pathlib import Path

from tokscale.base.errors import DataError


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, or of one that a link names; nothing waits for a pipe's other end.

    Raises:
        DataError: When there is none: missing, a link to nothing, a pipe, a socket, a device, a folder.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        what = "a link to a file that is not there" if path.is_symlink() else "no such file"
        raise DataError(f"{path}: {what}") from None
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV, errno.ELOOP, errno.EISDIR):
            raise DataError(f"{path}: not a file ({error.strerror})") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path}: not a file, but a folder, a pipe, a socket or a device")
    return descriptor


def is_hidden(path: str) -> bool:
    """Whether a file is none of the data: hidden, or in a hidden folder, or what a Mac or an editor left beside it.

    `._name` and `__MACOSX` come of archives made on a Mac, `.ipynb_checkpoints` of notebooks; `.png` has no name.
    """
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)
