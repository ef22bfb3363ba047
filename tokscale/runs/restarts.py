"""A job that is started again and again without getting anywhere must end, whoever starts it again."""

import json
import os
import time
from pathlib import Path
from typing import Any

from tokscale.base.errors import EnvironmentRefused
from tokscale.base.files import read_regular, row_of
from tokscale.base.text import lines_of
from tokscale.checkpoint.status import newest_step
from tokscale.dist.slurm import job_name, restarts

STARTS_FILE = "starts.jsonl"
LAST_END = "TOKSCALE_LAST_END"
"""Set by the batch script: why the start before this one ended (`preempted failed nodes unstarted`)."""
IDLE_STARTS = 3
"""Starts of one job in a row that may find the same newest checkpoint; the scheduler is not asked for another."""


def note_start(folder: Path) -> None:
    """Append this start to `starts.jsonl`. By the main rank.

    Raises:
        EnvironmentRefused: When the starts of this job before it made no checkpoint.
    """
    job = job_name()
    step = newest_step(folder / "checkpoints")
    # Preemptions and nodes that were left out say nothing of the job. Without our batch file nobody knows why it ended.
    reason = os.environ.get(LAST_END, "failed") if restarts() else ""
    earlier = [start for start in read_starts(folder) if start["job"] == job]
    failed = [start for start in earlier if start.get("after", "failed") in ("", "failed")]
    before = failed[-IDLE_STARTS:] if reason == "failed" else []
    with open(folder / STARTS_FILE, "a") as file:
        start = {"time": round(time.time(), 3), "job": job, "restart": restarts(), "after": reason, "step": step}
        file.write(json.dumps(start) + "\n")
    if job and restarts() and len(before) == IDLE_STARTS and all(start["step"] == step for start in before):
        raise EnvironmentRefused(
            f"{folder}: job {job} was started {IDLE_STARTS + 1} times at step {step} and saved nothing in between; "
            "look at logs/, then submit it again (a smaller checkpoint.every_steps loses less to each failure)"
        )


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run so far; a torn line is left out."""
    path = folder / STARTS_FILE
    lines = lines_of(read_regular(path).decode(errors="replace")) if path.exists() else []
    rows = (row_of(line, "job", "step") for line in lines)
    return [row for row in rows if row is not None]
