"""The kernel's file locks, on file systems that may not have them."""

import errno
import fcntl
from typing import IO

EXCLUSIVE, SHARED = fcntl.LOCK_EX, fcntl.LOCK_SH
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EPROTONOSUPPORT}
"""What Lustre without `flock`, NFS without its lock service, and FUSE file systems answer."""


def try_lock(file: IO[str], kind: int, *, wait: bool = False) -> bool | None:
    """Take the kernel's lock of an open file.

    Args:
        file: Open; the lock goes with its closing.
        kind: `EXCLUSIVE` or `SHARED`.
        wait: Until it is free.

    Returns:
        Whether it is ours; None where the file system has no such locks.
    """
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def unlock(file: IO[str]) -> None:
    """Give the lock back; closing alone would leave it to a forked child that still runs."""
    try:
        fcntl.flock(file, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
