"""What `submit` leaves in a run folder: `submitted/<time>/` with configuration, settings, code and job numbers."""

import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokscale
from tokscale.base.errors import DataError
from tokscale.base.files import read_json, write_json
from tokscale.base.package_data import package_data_path
from tokscale.dist.slurm import JobState, job_states
from tokscale.runs.outcome import read_outcomes

SUBMITTED, JOBS_FILE, CODE, COMMAND_FILE = "submitted", "jobs.json", "code", "command.txt"
PROGRAMS = {"embed": "tokenize"}
"""Stages that run the program of another one, and have its keys."""
STATE = "state"
"""Below a submission: what batch scripts leave of each job (`slurm/lib/restart.sh`)."""
COMMIT_FILE, UNKNOWN = "commit.txt", "unknown"
"""Beside frozen code: of which commit it is, since git cannot be asked there."""


@dataclass(frozen=True)
class Job:
    """One queued job."""

    name: str
    """Of its stage; `tokenize` and `embed` have two, `tokenize-close` and `embed-close` after the workers."""
    job: str
    """The scheduler's id."""
    tasks: int = 0
    """Of an array; 0 means none."""


@dataclass(frozen=True)
class Submission:
    """One call of `submit`."""

    folder: Path
    jobs: tuple[Job, ...]


def write_jobs(folder: Path, jobs: Sequence[Job]) -> None:
    """Write `jobs.json`."""
    write_json(folder / JOBS_FILE, {"jobs": [asdict(job) for job in jobs]})


def read_submissions(run_dir: Path) -> list[Submission]:
    """What was submitted for a run folder, oldest first.

    Raises:
        DataError: When a `jobs.json` is damaged; names it.
    """
    found = []
    for path in sorted(run_dir.glob(f"{SUBMITTED}/*/{JOBS_FILE}")):
        values = read_json(path)
        try:
            if isinstance(values.get("jobs"), list):
                jobs = tuple(Job(**job) for job in values["jobs"])
            else:  # version 0.1 wrote `{"train": "105"}`
                jobs = tuple(Job(name, str(job)) for name, job in values.items())
            found.append(Submission(path.parent, jobs))
        except (TypeError, AttributeError):
            raise DataError(f"{path}: is no list of jobs; move {path.parent} away") from None
    return found


def code_sources() -> dict[str, Path]:
    """What has to be copied for the running code to run elsewhere: name below the copy, and where it lies now."""
    package = Path(tokscale.__file__).resolve().parent
    found = {package.name: package}
    if (package.parent / "pyproject.toml").exists():  # a checkout; a wheel has the others inside the package
        found |= {name: package_data_path(name) for name in ("configs", "slurm")}
        found["pyproject.toml"] = package.parent / "pyproject.toml"
    return found


def freeze_code(folder: Path, commit: str | None) -> Path:
    """Copy the running code into a submission's folder, so that its jobs run it whatever is edited meanwhile.

    Returns:
        The folder that goes into `PYTHONPATH`.
    """
    code = folder / CODE
    for name, source in code_sources().items():
        if source.is_dir():
            shutil.copytree(source, code / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            code.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, code / name)
    (code / COMMIT_FILE).write_text(f"{commit or UNKNOWN}\n")
    return code


def frozen_commit(package: Path) -> str | None:
    """The commit of frozen code; None when a package is not frozen."""
    try:
        return (package.parent / COMMIT_FILE).read_text().strip()
    except OSError:
        return None


def jobs_text(jobs: Sequence[Job]) -> str:
    """The content of `jobs.json`, for a script that writes it; job ids may be variables of the shell."""
    return json.dumps({"jobs": [asdict(job) for job in jobs]})


@dataclass(frozen=True)
class QueuedJob:
    """A job, the submission it belongs to, and what became of it."""

    submission: Submission
    job: Job
    state: JobState

    @property
    def stage(self) -> str:
        """The stage it belongs to."""
        return stage_of(self.job)

    @property
    def log(self) -> Path:
        """What it has printed; of an array, a pattern."""
        run_dir = self.submission.folder.parents[1]
        return run_dir / "logs" / f"slurm-{self.job.name}-{self.job.job}{'_*' if self.job.tasks else ''}.log"

    def ended_well(self, run_dir: Path) -> bool:
        """Whether its part of the pipeline is done.

        A scheduler without accounting forgets jobs within minutes, and what a job could not do a person may have done
        since; then the run folder, where each finished stage leaves a record, decides.
        """
        if self.state.well or any(outcome["code"] == 0 for outcome in self.outcomes(run_dir)):
            return True
        record = run_dir / "stages" / f"{self.stage}.json"
        # Many processes tokenize, and each leaves this record: only one says that all is done.
        return self.stage == self.job.name != "tokenize" and _newer(record, self.submission.folder / JOBS_FILE)

    def outcomes(self, run_dir: Path) -> list[dict[str, Any]]:
        """How the starts of this job ended, oldest first."""
        kept = read_outcomes(run_dir, PROGRAMS.get(self.stage, self.stage))
        return [found for found in kept if str(found.get("job")).partition("_")[0] == self.job.job]

    def notes(self, kind: str) -> list[str]:
        """What the batch scripts of its tasks have left beside each other: `why` they ended, reasons of `starts`."""
        folder, name = self.submission.folder / STATE, self.job.job
        paths = [folder / f"{name}.{kind}", *sorted(folder.glob(f"{name}_*.{kind}"))]
        return [path.read_text().strip() for path in paths if path.is_file()]


def stage_of(job: Job) -> str:
    """The stage a job belongs to."""
    return job.name.removesuffix("-close")


def queued_jobs(run_dir: Path) -> list[QueuedJob]:
    """Of each part of the pipeline the job submitted last, and every other that still lives; in order of submission."""
    found = [(submission, job) for submission in read_submissions(run_dir) for job in submission.jobs]
    states = job_states([job.job for _, job in found])
    newest = {job.name: job.job for _, job in found}
    return [
        QueuedJob(submission, job, states[job.job])
        for submission, job in found
        if newest[job.name] == job.job or not (states[job.job].over or states[job.job].state == "UNREACHABLE")
    ]


def lost_jobs(run_dir: Path, jobs: Sequence[QueuedJob]) -> list[QueuedJob]:
    """Those that are over and did not end well: failed, or cancelled since one before them failed.

    Of a stage with several jobs the last one looks at the whole, so it decides for all.
    """
    last = {queued.stage: queued.job.name for queued in jobs}
    lost = [queued for queued in jobs if queued.state.over and not queued.ended_well(run_dir)]
    decided = {queued.stage for queued in lost if queued.job.name == last[queued.stage]}
    return [queued for queued in lost if queued.stage in decided]


def queue_lines(run_dir: Path) -> Iterator[str]:
    """What became of the jobs that were submitted, and the command that queues what is missing, for a person."""
    jobs = queued_jobs(run_dir)
    if jobs and all(queued.state.state == "UNREACHABLE" for queued in jobs):
        yield f"{len(jobs)} job(s) were submitted; the scheduler cannot be asked here: look from a login node"
        return
    for queued in jobs:
        yield f"job {queued.job.job} {queued.job.name}: {_became(run_dir, queued)}"
    lost = lost_jobs(run_dir, jobs)
    if lost:
        names = ", ".join(dict.fromkeys(queued.stage for queued in lost))
        yield f"to queue what is missing ({names}): {_again(lost[0].submission)}"


def _became(run_dir: Path, queued: QueuedJob) -> str:
    """What became of a job, in words."""
    state = queued.state
    if state.over and queued.ended_well(run_dir):
        return "done"
    words = state.tasks or state.state.lower().replace("_", " ")
    known = _REASONS.get(state.reason) or next((w for start, w in _KINDS.items() if state.reason.startswith(start)), "")
    why = known.format(job=queued.job.job, reason=state.reason) or state.reason
    if state.over:
        left = queued.notes("why")
        outcomes = [found for found in queued.outcomes(run_dir) if found["code"]]
        if outcomes and (not left or _BY_THE_STAGE in left[0]):
            left = [f"ended with {outcomes[-1]['code']}: {outcomes[-1]['message']}"]
        logs = list(queued.log.parent.glob(queued.log.name))
        if state.state == "UNKNOWN":  # without accounting a scheduler forgets within minutes
            began = bool(logs or left or queued.outcomes(run_dir))
            words, why = ("failed", "") if began else ("never began", _FORGOTTEN)
        why = "; ".join(dict.fromkeys(left)) or why
        if state.state != "CANCELLED" and not outcomes and logs:
            why += f"{'; ' if why else ''}its log is {queued.log}"
    starts = [start for text in queued.notes("starts") for start in text.split() if start not in ("started", "ended")]
    before = f", started again after: {', '.join(starts)}" if starts else ""
    return f"{words}{f' ({why})' if why else ''}{f' on {state.nodes}' if state.nodes else ''}{before}"


def _again(submission: Submission) -> str:
    """The command that queues the rest of a submission."""
    try:
        command = (submission.folder / COMMAND_FILE).read_text().strip()
    except OSError:
        command = f"tokscale submit recipe={shlex.quote(str(submission.folder / 'recipe.yaml'))}"
    return f"{command} action=missing"


def _newer(path: Path, other: Path) -> bool:
    try:
        return path.stat().st_mtime >= other.stat().st_mtime
    except OSError:
        return False


_BY_THE_STAGE = "it would again"
"""What the batch script says when the stage itself has said more (`slurm/lib/restart.sh`)."""
_FORGOTTEN = "it was cancelled, or the job before it did not end well; the scheduler has forgotten it"
_REASONS = {
    "Dependency": "waits for the job before it",
    "DependencyNeverSatisfied": "the job before it did not end well",
    "BeginTime": "waits a moment after it was requeued",
    "Priority": "others are before it",
    "Resources": "waits for free nodes",
    "NodeDown": "a node went down",
    "JobHeldUser": "held; `scontrol release {job}` lets it go",
    "JobHeldAdmin": "held by an operator",
    "JobArrayTaskLimit": "as many of its tasks run as may at once",
    "NonZeroExitCode": "ended with a code above 0; the log says why",
    "RaisedSignal": "killed by a signal; the log says which",
    "TimeLimit": "its time was over before it had saved; give it more, or let it warn earlier (cluster.signal_seconds)",
    "OutOfMemory": "out of memory; give it more (cluster.memory)",
    "PartitionDown": "its partition is down",
    "PartitionConfig": "asks for more than nodes of its partition have; cancel it and change what it asks for",
    "PartitionNodeLimit": "asks for more nodes than its partition gives; cancel it and ask for fewer",
    "JobHoldMaxRequeue": "held, as it came again too often; `scontrol release {job}` lets it go",
    "PartitionTimeLimit": "asks for more time than its partition gives; cancel it and change cluster.time",
    "BadConstraints": "no nodes are left that fit; `scontrol update JobId={job} ExcNodeList=` gives excluded ones back",
    "JobLaunchFailure": "could not be launched; look at the node and the folder of its log",
    "InvalidAccount": "its account may not use this partition",
}
_KINDS = {
    "launch_failed": "could not be launched, held; look at the node, then `scontrol release {job}`",
    "launch failed": "could not be launched, held; look at the node, then `scontrol release {job}`",
    "ReqNodeNotAvail": "waits for nodes that are down, drained or reserved ({reason})",
    "Nodes_required": "waits for nodes that are down, drained or reserved",
    "Nodes required": "waits for nodes that are down, drained or reserved",
    "Reserv": "waits for its reservation ({reason})",
    "QOS": "a limit of its QOS ({reason})",
    "Assoc": "a limit of its account ({reason})",
    "Licenses": "waits for licenses",
}
"""By how the reason begins."""
