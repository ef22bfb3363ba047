"""One job at a time in a run folder, on one machine or on a file system that many share.

The kernel's lock does it wherever it reaches: it is freed with its process, however that ends. Some shared file systems
keep such locks to the machine that took them. So the file also says who holds it, and whoever gets the kernel's lock
from another machine's record asks the scheduler whether that job still runs; without a scheduler, the holder's sign of
life, the time of the file, decides.
"""

import fcntl
import os
import re
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from tokscale.base.errors import EnvironmentRefused
from tokscale.dist.slurm import is_live
from tokscale.runs.outcome import RunFolderRefused

LOCK_FILE = ".lock"
_REFRESH, _STALE = 20.0, 90.0
"""Seconds between heartbeats, and without one after which a holder on another machine counts as dead."""
_MOMENT = 0.01
"""Seconds in which whoever looks at a lock is done."""


class RunFolderInUseError(RunFolderRefused, EnvironmentRefused):
    """Another job works in the folder."""


class FolderLock:
    """A run folder's lock, held from construction to `release` or the end of the process."""

    def __init__(self, folder: Path, job: str = ""):
        """Take the lock of `folder` for the scheduler's `job`.

        Raises:
            RunFolderInUseError: When a job that still runs holds it; says which.
        """
        self._path = folder / LOCK_FILE
        self._file = _locked(self._path, job)
        words = f", job {job}" if job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}{words} since {since}\n")
        self._file.flush()
        self._released = threading.Event()
        threading.Thread(target=self._live, name="lock", daemon=True).start()

    def release(self) -> None:
        """Free the folder. The file stays, empty: to remove it would be a race."""
        self._released.set()
        self._file.truncate(0)
        fcntl.flock(self._file, fcntl.LOCK_UN)  # closing alone would leave it to a forked child that still runs
        self._file.close()

    def _live(self) -> None:
        while not self._released.wait(_REFRESH):
            with suppress(OSError):  # a folder that is moved away meanwhile is no reason to fail
                os.utime(self._path)


def holder(folder: Path) -> str | None:
    """Who works in the folder right now, in words; None when nobody does."""
    try:
        with open(folder / LOCK_FILE) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip()
            fcntl.flock(file, fcntl.LOCK_UN)  # before the scheduler is asked: a job that starts now may have it
            record = file.read().strip()
            return record if _why_alive(folder / LOCK_FILE, record, "") else None
    except FileNotFoundError:
        return None


def _locked(path: Path, job: str) -> IO[str]:
    file = open(path, "a+")  # noqa: SIM115 - kept open for as long as it is held
    # Asked before the open file is written to: its time is the holder's heartbeat.
    taken = not _take(file)
    file.seek(0)
    record = file.read().strip()
    why = "" if taken else _why_alive(path, record, job)
    if taken or why:
        file.close()
        raise RunFolderInUseError(f"{path.parent}: in use by {record}{why}; wait for it, or choose another run_dir")
    return file


def _take(file: IO[str]) -> bool:
    """Get the kernel's lock; False when a job has it. Who only looks, as `holder` does, shares it for a moment."""
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(file, fcntl.LOCK_UN)
        time.sleep(_MOMENT)


def _why_alive(path: Path, record: str, job: str) -> str | None:
    """Whether the holder that a record names lives although the kernel's lock was free here; None when it is dead."""
    found = re.fullmatch(r"process \d+ on (.+?)(?:, job (\S+))? since .*", record)
    if found is None or found[1] == socket.gethostname() or (job and found[2] == job):
        return None  # nobody, this machine's kernel knows it to be dead, or an earlier start of ourselves
    live = is_live(found[2]) if found[2] else None
    if live is not None:
        return " (the scheduler says that it runs)" if live else None
    age = _age(path)
    return f" (on another machine; heartbeat {age:.0f} s ago, dead after {_STALE:.0f} s)" if age < _STALE else None


def _age(path: Path) -> float:
    """Seconds since a file was touched, by the clock of its file system, which may not be this machine's."""
    probe = path.with_name(f".clock.{socket.gethostname()}.{os.getpid()}")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink(missing_ok=True)
    return now - path.stat().st_mtime
