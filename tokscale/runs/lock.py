"""One job at a time in a run folder, on one machine or on a file system that many share.

The kernel's lock does it wherever it reaches: it is freed with its process, however that ends. Some shared file systems
keep such locks to the machine that took them. So the file also says who holds it, and whoever gets the kernel's lock
from another machine's record asks the scheduler whether that job still runs; without a scheduler, the holder's sign of
life, the time of the file, decides. File systems without such locks leave the record alone to decide: it is read again
a moment after it was written, and of two that came at once the first line counts.
"""

import os
import re
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from tokscale.base.errors import EnvironmentRefused, StorageError
from tokscale.base.flock import EXCLUSIVE, SHARED, try_lock, unlock
from tokscale.dist.slurm import is_live
from tokscale.runs.outcome import RunFolderRefused

LOCK_FILE = ".lock"
_REFRESH, _STALE = 20.0, 90.0
"""Seconds between heartbeats, and without one after which a holder on another machine counts as dead."""
_MOMENT = 0.01
"""Seconds in which whoever looks at a lock is done."""
_SETTLE = 0.5
"""Seconds in which, without kernel locks, two that come at once have both written their line."""


class RunFolderInUseError(RunFolderRefused, EnvironmentRefused):
    """Another job works in the folder."""


class FolderLock:
    """A folder's lock, held from construction to `release` or the end of the process."""

    def __init__(self, folder: Path, job: str = "", name: str = LOCK_FILE):
        """Take the lock of `folder`.

        Args:
            folder: Stands.
            job: The scheduler's job that takes it; empty outside one.
            name: Of the lock's file; a folder may have several.

        Raises:
            RunFolderInUseError: When a job that still runs holds it; says which.
        """
        self._path = folder / name
        self._file, kernel = _locked(self._path, job)
        words = f", job {job}" if job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.record = f"process {os.getpid()} on {socket.gethostname()}{words} since {since}"
        self._file.truncate(0)
        self._file.write(f"{self.record}\n")
        self._file.flush()
        if not kernel:
            _refuse_if_beaten(self._path, self._file, self.record)
        self._released = threading.Event()
        threading.Thread(target=self._live, name="lock", daemon=True).start()

    def release(self) -> None:
        """Free the folder. The file stays, empty: to remove it would be a race."""
        self._released.set()
        self._file.truncate(0)
        unlock(self._file)
        self._file.close()

    def _live(self) -> None:
        while not self._released.wait(_REFRESH):
            with suppress(OSError):  # a folder that is moved away meanwhile is no reason to fail
                os.utime(self._path)


def holder(folder: Path) -> str | None:
    """Who works in the folder right now, in words; None when nobody does."""
    path = folder / LOCK_FILE
    try:
        with open(path) as file:
            free = try_lock(file, SHARED)
            if free:
                unlock(file)  # before the scheduler is asked: a job that starts now may have it
            record = _first_line(file)
            return record if free is False or _why_alive(path, record, "", kernel=free is True) else None
    except FileNotFoundError:
        return None


def _locked(path: Path, job: str) -> tuple[IO[str], bool]:
    """The lock's file, and whether the kernel holds it for us."""
    if path.is_symlink():
        raise StorageError(f"{path}: is a link; a lock is not written through one, remove it")
    file = open(path, "a+")  # noqa: SIM115 - kept open for as long as it is held
    try:
        # Asked before the open file is written to: its time is the holder's heartbeat.
        free = _take(file)
        record = _first_line(file)
        why = "" if free is False else _why_alive(path, record, job, kernel=free is True)
        if free is False or why:
            raise RunFolderInUseError(f"{path.parent}: in use by {record}{why}; wait for it, or choose another run_dir")
    except BaseException:
        file.close()
        raise
    return file, free is True


def _take(file: IO[str]) -> bool | None:
    """As `try_lock`. Who only looks, as `holder` does, shares the lock for a moment."""
    while (free := try_lock(file, EXCLUSIVE)) is False:
        if not try_lock(file, SHARED):
            return False
        unlock(file)
        time.sleep(_MOMENT)
    return free


def _refuse_if_beaten(path: Path, file: IO[str], record: str) -> None:
    """Without the kernel's lock: of two that came at once, the one whose line stands first has the folder."""
    time.sleep(_SETTLE)
    with open(path) as again:
        first = _first_line(again)
    if first != record:
        file.close()
        raise RunFolderInUseError(f"{path.parent}: in use by {first}, which came at the same time")


def _first_line(file: IO[str]) -> str:
    file.seek(0)
    return file.readline().strip()


def _why_alive(path: Path, record: str, job: str, *, kernel: bool) -> str | None:
    """Whether the holder that a record names lives although the kernel's lock was not taken; None when it is dead.

    Args:
        path: Of the record.
        record: Its first line.
        job: Ours.
        kernel: Whether there are kernel locks here, so that no process of this machine can be the holder.
    """
    found = re.fullmatch(r"process (\d+) on (.+?)(?:, job (\S+))? since .*", record)
    if found is None:
        return None
    if found[2] == socket.gethostname():
        if kernel or not _is_process(int(found[1])):
            return None
    elif job and found[3] == job:
        return None  # an earlier start of ourselves
    else:
        live = is_live(found[3]) if found[3] else None
        if live is not None:
            return " (the scheduler says that it runs)" if live else None
    age = _age(path)
    where = "on this machine" if found[2] == socket.gethostname() else "on another machine"
    return f" ({where}; heartbeat {age:.0f} s ago, dead after {_STALE:.0f} s)" if age < _STALE else None


def _is_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _age(path: Path) -> float:
    """Seconds since a file was touched, by the clock of its file system, which may not be this machine's."""
    probe = path.with_name(f".clock.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
    except OSError:  # a folder that may only be looked at
        now = time.time()
    return now - path.stat().st_mtime
