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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from tokscale.base.errors import EnvironmentRefused, StopRequested, TokscaleError
from tokscale.base.log import logger

log = logger("slurm")

JOB_END, LIVE_JOBS, OUTCOME = "TOKSCALE_JOB_END", "TOKSCALE_LIVE_JOBS", "TOKSCALE_OUTCOME"
"""Variables of the batch script: when the job's time is over (seconds since 1970), the jobs that lived when it started,
and the file in which the stage says how it ended."""
_PARTS = {"tokenize": ("tokenize-close", "embed", "embed-close")}
"""Jobs with keys of their own that run the program of a stage; `submit` calls them `tokscale-<name>`."""
SIGNAL_SECONDS = "TOKSCALE_SIGNAL_SECONDS"
"""Variable that says how long before the end of the time the job is warned, where a cluster file says so."""
_TIMEOUT = 30.0
_LATE_SECONDS = 600.0
"""Before the end of the time, in which a warning is meant to say that it ends; see `--signal` of the batch files."""
_EARLY_SECONDS = 90.0
"""By which Slurm may be early, and some more."""
_SAVES_ITSELF = ("train", "train-tokenizer", "tokenize")
"""Stages that take the warning themselves as soon as they have something to save."""
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""slurm.h counts its reserved steps down from here: pending, external, batch, interactive."""
_HABITS = ("SQUEUE_", "SACCT_", "SLURM_TIME_FORMAT")
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
        command = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, env=_plain_environ())
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

    def near(self, needed: float = 0.0) -> bool:
        """Whether it is time to save. Asks again before it says so, since an operator may have given more time.

        Args:
            needed: Seconds that it takes to stop, where that is known to be more than the margin.
        """
        if not self._within(needed):
            return False
        self._fields = self._look() or self._fields
        return self._within(needed)

    def _look(self) -> dict[str, str]:
        if shutil.which("scontrol") is None:  # in a container: what the batch script knew when it started
            end = float(self._known) if self._known else None
            return {} if end is None else {"EndTime": datetime.datetime.fromtimestamp(end).isoformat()}
        return show_job(self._job)

    def _within(self, needed: float) -> bool:
        end, start = read_time(self._fields, "EndTime"), read_time(self._fields, "StartTime")
        if end is None:
            return False
        length = float("inf") if start is None else end - start
        return time.time() >= end - min(max(self._margin, needed), length / 4)


def note_joined(environ: Mapping[str, str] = os.environ) -> None:
    """Tell the batch script that all ranks have met: what ends the job before is the machine's or the image's fault."""
    if environ.get(OUTCOME):
        with suppress(OSError):
            Path(f"{environ[OUTCOME]}.joined").touch()


class _Warned(BaseException):
    """Raised where a signal finds the program; no handler of failures may take it for one of its own."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


_kept = 0
"""Pieces of work that this process has finished and its next start would find done."""


def note_kept() -> None:
    """A piece of the stage's work is finished, and kept for its next start."""
    global _kept
    _kept += 1


@contextmanager
def time_limit(stage: str, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """End a stage when the scheduler warns that its time is nearly over (SIGUSR1), or that others need the nodes.

    Stages that can save take the signals themselves, once they have begun. What is warned before it has kept anything
    would begin from the start, and be warned again, for ever: it ends for good. Preemption (SIGTERM) says nothing about
    the time, so whoever is preempted comes again.

    Raises:
        StopRequested: When the next start goes on from what was kept, or has the time that this one was not given.
        EnvironmentRefused: When it would get no further; names the key that gives it more time.
    """
    warned = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal warned
        if not warned:  # a second one must not end what the first has begun
            warned = True
            raise _Warned(number)

    if not environ.get(OUTCOME) or threading.current_thread() is not threading.main_thread():
        yield
        return
    # Of several ranks, srun ends the others by SIGTERM when one has failed; that one has the word.
    alone = int(environ.get("SLURM_STEP_NUM_TASKS") or 1) == 1
    numbers = (signal.SIGUSR1, signal.SIGTERM) if alone else (signal.SIGUSR1,)
    before, kept = {number: signal.signal(number, on_signal) for number in numbers}, _kept
    try:
        yield
    except _Warned as warning:
        raise _ended_early(stage, warning.number, _kept - kept, environ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refuse_short_time(stage: str, environ: Mapping[str, str] = os.environ) -> None:
    """For a stage that was asked to stop: end it for good if its time was too short for a single piece of its work.

    Raises:
        EnvironmentRefused: When nothing was kept and its time is nearly over, so that the next start would get no
            further.
    """
    if not _kept and environ.get(OUTCOME) and _is_late(environ):
        raise _too_short(stage, environ)


def _is_late(environ: Mapping[str, str]) -> bool:
    end, warned = environ.get(JOB_END), float(environ.get(SIGNAL_SECONDS) or 0)
    return bool(end) and time.time() > float(end or 0) - max(_LATE_SECONDS, warned + _EARLY_SECONDS)


def _ended_early(stage: str, number: int, kept: int, environ: Mapping[str, str]) -> TokscaleError:
    name = signal.Signals(number).name
    if kept:
        return StopRequested(f"stopped ({name}) with {kept} more piece(s) kept; the same command goes on from there")
    if number == signal.SIGTERM:
        return StopRequested(f"stopped ({name}) before anything was kept; the same command begins again")
    if stage not in _SAVES_ITSELF or _is_late(environ):
        return _too_short(stage, environ)
    return StopRequested(f"stopped ({name}) before it had begun; the same command goes on")


def _too_short(stage: str, environ: Mapping[str, str]) -> EnvironmentRefused:
    job = environ.get("SLURM_JOB_NAME", "").removeprefix("tokscale-")
    part = job if job in _PARTS.get(stage, ()) else stage
    return EnvironmentRefused(
        f"the time limit is too short for {part}: nothing was finished that its next start would find, so it would "
        f"get no further; give it more: cluster.stages.{part}.time=HOURS:00:00, or sbatch --time=HOURS:00:00"
    )


@dataclass(frozen=True)
class JobState:
    """What the scheduler says of a job, of all tasks of an array together."""

    state: str
    """`RUNNING`, `PENDING`, `COMPLETED`, `CANCELLED`, ...; `UNKNOWN` when it has forgotten the job, `UNREACHABLE` when
    it cannot be asked here."""
    reason: str = ""
    """Why it waits, or why it ended; empty when there is nothing to say."""
    nodes: str = ""
    """Where it runs or ran."""
    tasks: str = field(default="", compare=False)
    """Of an array whose tasks differ: how many are in which state, in words."""

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state not in _LIVE_STATES | _WAITING_STATES | {"UNREACHABLE"}

    @property
    def well(self) -> bool:
        """Whether it ended as it should."""
        return self.state == "COMPLETED"


def job_states(jobs: Sequence[str]) -> dict[str, JobState]:
    """What became of jobs: asked of `squeue`, then of the accounting, then of the controller's memory."""
    found: dict[str, dict[str, JobState]] = {job: {} for job in jobs}
    if not jobs:
        return {}
    command = ("squeue", "--noheader", "--array", f"--jobs={','.join(jobs)}", "--format=%F|%A|%T|%r|%N")
    told = _ask(*command, quiet=True, forgotten="Invalid job id")
    reached = told is not None
    for line in (told or "").splitlines():
        array, job, state, reason, nodes = line.split("|")
        for name in {array, job} & found.keys():
            found[name][job] = _state(state, reason, nodes)
    # Of an array, squeue only knows the tasks that are not over.
    for job, tasks in found.items():
        if tasks and all(name == job for name in tasks):
            continue
        command = ("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,Reason,NodeList,JobIDRaw")
        for line in (_ask(*command, quiet=True) or "").splitlines():
            reached = True
            state, reason, nodes, *numbers = line.split("|")
            tasks.setdefault(numbers[0] if numbers else job, _state(state.split()[0], reason, nodes))
        if tasks and all(state.over for state in tasks.values()):
            continue
        told = _ask("scontrol", "show", "job", "--oneliner", job, quiet=True, forgotten="Invalid job id")
        reached = reached or told is not None
        for line in (told or "").splitlines():
            fields = dict(re.findall(r"(\w+)=(\S*)", line))
            nodes = fields.get("NodeList", "").replace("(null)", "")
            state = _state(fields["JobState"], fields.get("Reason", "None"), nodes)
            tasks.setdefault(fields.get("JobId", job), state)
    return {job: _together([*tasks.values()], reached=reached) for job, tasks in found.items()}


def _state(state: str, reason: str, nodes: str) -> JobState:
    return JobState(state, "" if reason == "None" else reason, nodes)


def _together(states: Sequence[JobState], *, reached: bool) -> JobState:
    """Of the tasks of an array: one that still lives, else one that failed, else any."""
    if not states:
        return JobState("UNKNOWN" if reached else "UNREACHABLE")
    order = [
        *(state for state in states if state.state in _LIVE_STATES),
        *(state for state in states if not state.over),
        *(state for state in states if not state.well),
        *states,
    ]
    counts = Counter(state.state.lower() for state in states)
    words = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    return replace(order[0], tasks=words if len(counts) > 1 else "")


def _ask(*command: str, quiet: bool = False, forgotten: str = "") -> str | None:
    """What a command prints; None, with a warning unless `quiet`, when it fails.

    Args:
        command: Of Slurm.
        quiet: Warn of nothing.
        forgotten: Words by which it says that there is no such thing: then it prints nothing, and has answered.
    """
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, env=_plain_environ())
    except (OSError, subprocess.SubprocessError) as error:
        if not quiet:
            log.warning("%s: %s", " ".join(command), error)
        return None
    if told.returncode != 0:
        if forgotten and forgotten in told.stderr:
            return ""
        if not quiet:
            log.warning("%s: %s", " ".join(command), told.stderr.strip())
        return None
    return told.stdout


def _plain_environ() -> dict[str, str]:
    """Ours, without what people set for their own eyes: it must not bend the answers of Slurm."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_HABITS)}
