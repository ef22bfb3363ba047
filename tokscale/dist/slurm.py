"""What a process asks of the scheduler it runs under: when its time ends, and to be started again.

Everything goes through `scontrol` and `squeue`, as every site has them. Outside a job nothing here does anything.
"""

import datetime
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

from tokscale.base.errors import EnvironmentRefused
from tokscale.base.log import logger

log = logger("slurm")

MAX_RESTARTS = "TOKSCALE_MAX_RESTARTS"
"""Set by `slurm/*.sbatch`: how often a job may be requeued. Without it none is: an `salloc` session goes on."""
_TIMEOUT = 30.0
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""slurm.h counts its reserved steps down from here: pending, external, batch, interactive."""
_LIVE_STATES = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "CONFIGURING", "RESIZING"}


class NodesRefusedError(EnvironmentRefused):
    """The machines of this job are not fit for it; it may be on others."""

    def __init__(self, message: str, nodes: Sequence[str] = ()):
        """Refuse `nodes`, by the scheduler's names."""
        super().__init__(message)
        self.nodes = tuple(nodes)


def job_name(environ: Mapping[str, str] = os.environ) -> str:
    """How `scontrol` calls this job: its id, or `<array>_<task>` for a task of an array; empty outside a job."""
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID", "")


def node_name(environ: Mapping[str, str] = os.environ) -> str:
    """What the scheduler calls this machine; its host name outside a job."""
    return environ.get("SLURMD_NODENAME") or os.uname().nodename


def slurm_step(environ: Mapping[str, str] = os.environ) -> str:
    """The step that `srun` started this process in; empty in a batch script, a login or an `salloc` shell.

    Those have steps, too, with numbers of their own (`SLURM_INTERACTIVE_STEP` and the like): one process, whatever the
    job was given.
    """
    step = environ.get("SLURM_STEP_ID", "")
    return step if step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP else ""


def restarts(environ: Mapping[str, str] = os.environ) -> int:
    """How often this job was started before."""
    return int(environ.get("SLURM_RESTART_COUNT") or 0)


def show_job(job: str) -> dict[str, str]:
    """The fields of `scontrol show job`; empty when it does not answer."""
    told = _ask("scontrol", "show", "job", "--oneliner", job)
    return dict(re.findall(r"(\w+)=(\S*)", told)) if told else {}


def is_live(job: str) -> bool | None:
    """Whether a job has processes; None when the scheduler cannot be asked."""
    try:
        told = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format", "%T"], capture_output=True, text=True, timeout=_TIMEOUT
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if told.returncode != 0:  # a job that ended long ago is forgotten: its id is not valid any more
        return False if "Invalid job id" in told.stderr else None
    return any(state in _LIVE_STATES for state in told.stdout.split())


def read_time(fields: Mapping[str, str], name: str) -> float | None:
    """A time of `show_job` as `time.time()`; None when there is none, as for the end of a job without limit."""
    try:
        return datetime.datetime.fromisoformat(fields.get(name, "")).timestamp()
    except ValueError:
        return None


class EndOfAllocation:
    """Tells when less than a margin is left of the job's time."""

    def __init__(self, margin: float, job: str | None = None):
        """Look up the end once.

        Args:
            margin: In seconds; of a short allocation no more than its last quarter is taken.
            job: This process's by default; empty means none.
        """
        self._margin = margin
        self._job = job_name() if job is None else job
        self._fields = show_job(self._job) if self._job else {}

    def near(self) -> bool:
        """Whether it is time to save. Asks again before it says so, since an operator may have given more time."""
        if not self._within():
            return False
        self._fields = show_job(self._job) or self._fields
        return self._within()

    def _within(self) -> bool:
        end, start = read_time(self._fields, "EndTime"), read_time(self._fields, "StartTime")
        if end is None:
            return False
        length = float("inf") if start is None else end - start
        return time.time() >= end - min(self._margin, length / 4)


def may_requeue(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a job that its batch file allows to come again."""
    return bool(job_name(environ) and environ.get(MAX_RESTARTS))


def requeue(why: str, *, exclude: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> bool:
    """Ask the scheduler to start this very job again; it then ends the present one. For the main rank alone.

    Only where the batch file allows it, and only while the job runs as it should: one that is cancelled or
    that the scheduler has put back itself must not come again on our account.

    Args:
        why: For the log.
        exclude: Nodes to avoid from now on.
        environ: The job's variables.

    Returns:
        Whether the job will come again.
    """
    if not may_requeue(environ):
        return False
    job, limit = job_name(environ), environ[MAX_RESTARTS]
    if restarts(environ) >= int(limit):
        log.warning("not requeued: job %s was started again %s times already (%s)", job, limit, MAX_RESTARTS)
        return False
    fields = show_job(job)
    if fields.get("JobState") != "RUNNING":
        log.warning("not requeued: job %s is %s", job, fields.get("JobState", "unknown to the scheduler"))
        return False
    log.warning("requeueing job %s: %s", job, why)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # the scheduler now ends this step; what follows is ours to finish
        signal.signal(number, signal.SIG_IGN)
    if _ask("scontrol", "requeue", job) is None:
        return False
    if exclude:
        present = fields.get("ExcNodeList", "")
        names = ",".join([*([present] if present not in ("", "(null)") else []), *exclude])
        _ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={names}")
        log.warning("job %s avoids %s from now on", job, names)
    return True


def _ask(*command: str) -> str | None:
    """What a command prints; None, with a warning, when it fails."""
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s: %s", " ".join(command), error)
        return None
    if told.returncode != 0:
        log.warning("%s: %s", " ".join(command), told.stderr.strip())
        return None
    return told.stdout
