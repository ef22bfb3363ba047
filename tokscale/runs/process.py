"""Which process wrote a record in a run folder, and whether it still lives."""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokscale.dist.slurm import is_live, node_name, slurm_step

STALE_SECONDS = 90.0
"""Without a heartbeat for so long, a process on another machine counts as dead where no scheduler can be asked."""


def owner() -> dict[str, Any]:
    """This process, as `is_alive` wants to find it in a record."""
    host, pid = socket.gethostname(), os.getpid()
    return {"host": host, "node": node_name(), "pid": pid, "started": _started(pid), "launch": _launch()}


def is_own(record: Mapping[str, Any]) -> bool:
    """Whether this very process wrote a record."""
    mine = owner()
    return all(record.get(key) == mine[key] for key in ("host", "pid", "started"))


def same_launch(record: Mapping[str, Any]) -> bool:
    """Whether a rank of this very launch wrote a record, as far as the launcher tells launches apart."""
    return bool(_launch()) and record.get("launch") == _launch()


def other_launch(record: Mapping[str, Any]) -> bool:
    """Whether a record is surely of another launch."""
    return bool(_launch()) and bool(record.get("launch")) and record["launch"] != _launch()


def is_alive(record: Mapping[str, Any], path: Path) -> bool:
    """Whether the process that wrote a record lives.

    Args:
        record: With what `owner` gave, and `job` for the scheduler's job.
        path: Of the record; its time is the process's last heartbeat.
    """
    if record.get("host") == socket.gethostname():
        started = _started(int(record.get("pid", 0)))
        return started is not None and started == record.get("started")
    live = is_live(str(record["job"])) if record.get("job") else None
    if live is not None:
        return live
    try:
        return time.time() - path.stat().st_mtime < STALE_SECONDS
    except OSError:
        return False


def _launch() -> str:
    step, run = slurm_step(), os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"step {step}" if step else "" if run == "none" else f"run {run}"


def _started(pid: int) -> str | None:
    """When a process of this machine was started, in the kernel's ticks; None when there is none."""
    try:
        stat = Path("/proc", str(pid), "stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        with suppress(OSError):  # a system without such files: that it lives must do
            os.kill(pid, 0)
            return "unknown"
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
