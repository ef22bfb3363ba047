"""What a process asks of the scheduler: when its own time ends, whether a job lives, and what became of jobs.

Everything goes through `scontrol`, `squeue` and `sacct`. In a container they are missing: what a stage must know there,
the batch script has asked before it (`slurm/lib/environment.sh`) and left in variables. To come again is for the batch
script to ask as well (`slurm/lib/restart.sh`). Outside a job nothing here does anything.
"""

import datetime
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tokscale.base.errors import EnvironmentRefused
from tokscale.base.log import logger

log = logger("slurm")

JOB_END, LIVE_JOBS, OUTCOME = "TOKSCALE_JOB_END", "TOKSCALE_LIVE_JOBS", "TOKSCALE_OUTCOME"
"""Variables of the batch script: when the job's time is over (seconds since 1970), the jobs that lived when it started,
and the file in which the stage says how it ended."""
_TIMEOUT = 30.0
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""slurm.h counts its reserved steps down from here: pending, external, batch, interactive."""
_LIVE_STATES = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "CONFIGURING", "RESIZING"}
_WAITING_STATES = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}


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
    """Whether a job has processes; None when the scheduler cannot be asked.

    In a container the batch script has asked for us, when this job started.
    """
    try:
        told = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format", "%T"], capture_output=True, text=True, timeout=_TIMEOUT
        )
    except FileNotFoundError:
        return job in os.environ[LIVE_JOBS].split(",") if os.environ.get(LIVE_JOBS) else None
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
        self._known = os.environ.get(JOB_END) if job is None else None
        self._fields = self._look() if self._job else {}

    def near(self) -> bool:
        """Whether it is time to save. Asks again before it says so, since an operator may have given more time."""
        if not self._within():
            return False
        self._fields = self._look() or self._fields
        return self._within()

    def _look(self) -> dict[str, str]:
        if shutil.which("scontrol") is None:  # in a container: what the batch script knew when it started
            end = float(self._known) if self._known else None
            return {} if end is None else {"EndTime": datetime.datetime.fromtimestamp(end).isoformat()}
        return show_job(self._job)

    def _within(self) -> bool:
        end, start = read_time(self._fields, "EndTime"), read_time(self._fields, "StartTime")
        if end is None:
            return False
        length = float("inf") if start is None else end - start
        return time.time() >= end - min(self._margin, length / 4)


def note_joined(environ: Mapping[str, str] = os.environ) -> None:
    """Tell the batch script that all ranks have met: what ends the job before is the machine's or the image's fault."""
    if environ.get(OUTCOME):
        with suppress(OSError):
            Path(f"{environ[OUTCOME]}.joined").touch()


@contextmanager
def time_limit(stage: str, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """End a stage that keeps nothing unfinished when the scheduler warns that its time is nearly over (SIGUSR1).

    It would begin from the start, and be warned again, for ever. Stages that can save take the signal themselves.

    Raises:
        EnvironmentRefused: Naming the key that gives it more time.
    """

    def warned(number: int, frame: object) -> None:
        raise EnvironmentRefused(
            f"the time limit is too short for {stage}, which keeps nothing of what it had begun; give it more: "
            f"cluster.stages.{stage}.time=HOURS:00:00, or sbatch --time=HOURS:00:00"
        )

    if not environ.get(OUTCOME) or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, warned)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


@dataclass(frozen=True)
class JobState:
    """What the scheduler says of a job, of all tasks of an array together."""

    state: str
    """`RUNNING`, `PENDING`, `COMPLETED`, `CANCELLED`, ...; `UNKNOWN` when it has forgotten the job."""
    reason: str = ""
    """Why it waits, or why it ended; empty when there is nothing to say."""
    nodes: str = ""
    """Where it runs or ran."""

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state not in _LIVE_STATES | _WAITING_STATES

    @property
    def well(self) -> bool:
        """Whether it ended as it should."""
        return self.state == "COMPLETED"


def job_states(jobs: Sequence[str]) -> dict[str, JobState]:
    """What became of jobs: asked of `squeue`, then of the accounting, then of the controller's memory."""
    found: dict[str, list[JobState]] = {job: [] for job in jobs}
    if not jobs:
        return {}
    told = _ask("squeue", "--noheader", "--array", "--format=%F|%A|%T|%r|%N", quiet=True) or ""
    for line in told.splitlines():
        array, job, state, reason, nodes = line.split("|")
        for name in {array, job} & found.keys():
            found[name].append(JobState(state, "" if reason == "None" else reason, nodes))
    for job in [job for job, states in found.items() if not states]:
        told = _ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,Reason,NodeList", quiet=True) or ""
        for line in told.splitlines():
            state, reason, nodes = line.split("|")
            found[job].append(JobState(state.split()[0], "" if reason == "None" else reason, nodes))
    for job in [job for job, states in found.items() if not states]:
        told = _ask("scontrol", "show", "job", "--oneliner", job, quiet=True) or ""
        for line in told.splitlines():
            fields = dict(re.findall(r"(\w+)=(\S*)", line))
            reason, nodes = fields.get("Reason", "None"), fields.get("NodeList", "")
            found[job].append(
                JobState(fields["JobState"], "" if reason == "None" else reason, "" if nodes == "(null)" else nodes)
            )
    return {job: _together(states) for job, states in found.items()}


def _together(states: Sequence[JobState]) -> JobState:
    """Of the tasks of an array: one that still lives, else one that failed, else any."""
    if not states:
        return JobState("UNKNOWN")
    order = [
        *(state for state in states if state.state in _LIVE_STATES),
        *(state for state in states if not state.over),
        *(state for state in states if not state.well),
        *states,
    ]
    return order[0]


def _ask(*command: str, quiet: bool = False) -> str | None:
    """What a command prints; None, with a warning unless `quiet`, when it fails."""
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        if not quiet:
            log.warning("%s: %s", " ".join(command), error)
        return None
    if told.returncode != 0:
        if not quiet:
            log.warning("%s: %s", " ".join(command), told.stderr.strip())
        return None
    return told.stdout
