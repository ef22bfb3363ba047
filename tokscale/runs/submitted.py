"""What `submit` leaves in a run folder: `submitted/<time>/` with configuration, settings, code and job numbers."""

import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tokscale
from tokscale.base.errors import DataError
from tokscale.base.files import read_json, write_json
from tokscale.base.package_data import package_data_path
from tokscale.dist.slurm import JobState, job_states

SUBMITTED, JOBS_FILE, CODE, COMMAND_FILE = "submitted", "jobs.json", "code", "command.txt"
COMMIT_FILE = "commit.txt"
"""Beside frozen code: of which commit it is, since git cannot be asked there."""


@dataclass(frozen=True)
class Job:
    """One queued job."""

    name: str
    """Of its stage; tokenization has two, `tokenize` and `tokenize-close`."""
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
    (code / COMMIT_FILE).write_text(f"{commit or 'unknown'}\n")
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


def ended_well(run_dir: Path, job: Job, state: JobState) -> bool:
    """Whether a job's stage is done.

    A scheduler without accounting forgets jobs within minutes; then the run folder, where each finished stage leaves a
    record, decides.
    """
    if state.state != "UNKNOWN":
        return state.well
    return (run_dir / "stages" / f"{stage_of(job)}.json").exists()


def stage_of(job: Job) -> str:
    """The stage a job belongs to."""
    return job.name.removesuffix("-close")


def lost_jobs(run_dir: Path, submission: Submission) -> list[tuple[Job, JobState]]:
    """Jobs of a submission that are over and did not end well: failed, or cancelled since one before them failed."""
    states = job_states([job.job for job in submission.jobs])
    return [
        (job, states[job.job])
        for job in submission.jobs
        if states[job.job].over and not ended_well(run_dir, job, states[job.job])
    ]


def queue_lines(run_dir: Path) -> Iterator[str]:
    """What became of the jobs of the last submission, and the command that queues what is missing, for a person."""
    submissions = read_submissions(run_dir)
    if not submissions:
        return
    last = submissions[-1]
    states = job_states([job.job for job in last.jobs])
    for job in last.jobs:
        state = states[job.job]
        done = state.state == "UNKNOWN" and ended_well(run_dir, job, state)
        words = "done" if done else state.state.lower().replace("_", " ")
        why = f" ({_REASONS.get(state.reason, state.reason)})" if state.reason and not state.well else ""
        nodes = f" on {state.nodes}" if state.nodes else ""
        yield f"job {job.job} {job.name}: {words}{why}{nodes}"
    lost = lost_jobs(run_dir, last)
    if lost:
        names = ", ".join(dict.fromkeys(stage_of(job) for job, _ in lost))
        yield f"to queue what is missing ({names}): {_again(last)}"


def _again(submission: Submission) -> str:
    """The command that queues the rest of a submission."""
    try:
        command = (submission.folder / COMMAND_FILE).read_text().strip()
    except OSError:
        command = f"tokscale submit recipe={shlex.quote(str(submission.folder / 'recipe.yaml'))}"
    return f"{command} action=missing"


_REASONS = {
    "Dependency": "waits for the job before it",
    "DependencyNeverSatisfied": "the job before it did not end well",
    "BeginTime": "waits a moment after it was requeued",
    "Priority": "others are before it",
    "Resources": "waits for free nodes",
    "NodeDown": "a node went down",
    "JobHeldUser": "held; scontrol release lets it go",
    "JobHeldAdmin": "held by an operator",
    "NonZeroExitCode": "ended with a code above 0; the log says why",
    "TimeLimit": "its time was over",
    "OutOfMemory": "out of memory",
    "launch_failed_requeued_held": "could not be launched, held; look at the node, then scontrol release",
}
