"""What is asked of the scheduler, with programs in its place that answer as Slurm 22.05 does."""

import signal
import time
from pathlib import Path

import pytest

from tokscale.dist.slurm import EndOfAllocation, is_live, job_name, may_requeue, node_name, read_time, requeue, restarts

JOB = {"SLURM_JOB_ID": "77", "TOKSCALE_MAX_RESTARTS": "3"}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Puts `scontrol` and `squeue` on the path; what they are asked is in `calls`."""

    def program(name: str, answer: str, code: int = 0) -> None:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>{tmp_path}/calls\n{answer}\nexit {code}\n')
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return program


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))


def test_a_job_of_an_array_has_the_name_that_scontrol_wants():
    assert job_name({}) == "" and job_name({"SLURM_JOB_ID": "5"}) == "5"
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert job_name(array) == "7_2"
    assert restarts({}) == 0 and restarts({"SLURM_RESTART_COUNT": "2"}) == 2
    assert node_name({"SLURMD_NODENAME": "n2"}) == "n2" and node_name({})


def test_a_running_job_is_requeued_and_then_deaf_to_the_scheduler(slurm, tmp_path):
    slurm("scontrol", 'echo "JobId=77 JobState=RUNNING ExcNodeList=n9"')
    assert requeue("preempted", exclude=("n1", "n2"), environ=JOB)
    assert calls(tmp_path) == [
        "scontrol show job --oneliner 77",
        "scontrol requeue 77",
        "scontrol update JobId=77 ExcNodeList=n9,n1,n2",
    ]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", "TIMEOUT"])
def test_a_job_that_does_not_run_is_left_alone(slurm, tmp_path, state):
    slurm("scontrol", f'echo "JobId=77 JobState={state}"')
    assert not requeue("preempted", environ=JOB)
    assert calls(tmp_path) == ["scontrol show job --oneliner 77"]


def test_requeueing_has_an_end_and_needs_to_be_allowed(slurm, tmp_path):
    slurm("scontrol", 'echo "JobState=RUNNING"')
    assert not requeue("again", environ=JOB | {"SLURM_RESTART_COUNT": "3"})
    assert not requeue("again", environ={"SLURM_JOB_ID": "77"}) and not may_requeue({"TOKSCALE_MAX_RESTARTS": "3"})
    assert calls(tmp_path) == []


def test_a_scheduler_that_does_not_answer_is_no_failure(slurm, monkeypatch):
    slurm("scontrol", "echo nonsense >&2", code=1)
    assert not requeue("again", environ=JOB) and not EndOfAllocation(60, "77").near()
    monkeypatch.setenv("PATH", "/nowhere")
    assert not requeue("again", environ=JOB) and is_live("77") is None


def test_the_end_of_the_time_is_near_within_the_margin(slurm):
    slurm("scontrol", f'echo "StartTime={stamp(-3600)} EndTime={stamp(100)}"')
    assert EndOfAllocation(120, "77").near() and not EndOfAllocation(60, "77").near()
    assert not EndOfAllocation(120, "").near()
    slurm("scontrol", f'echo "StartTime={stamp(-20)} EndTime={stamp(40)}"')
    assert not EndOfAllocation(120, "77").near()  # of a minute no more than the last quarter
    slurm("scontrol", f'echo "StartTime={stamp(-50)} EndTime={stamp(10)}"')
    assert EndOfAllocation(120, "77").near()
    assert read_time({"EndTime": "Unknown"}, "EndTime") is None and read_time({}, "EndTime") is None


def test_more_time_given_on_the_way_is_noticed(slurm):
    slurm("scontrol", f'echo "StartTime={stamp(-3600)} EndTime={stamp(10)}"')
    end = EndOfAllocation(120, "77")
    slurm("scontrol", f'echo "StartTime={stamp(-3600)} EndTime={stamp(7200)}"')
    assert not end.near()


def test_whether_a_job_lives(slurm):
    slurm("squeue", "echo RUNNING")
    assert is_live("77") is True
    slurm("squeue", "echo PENDING")  # requeued: it has no processes
    assert is_live("77") is False
    slurm("squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2', code=1)
    assert is_live("77") is False
    slurm("squeue", 'echo "Unable to contact slurm controller" >&2', code=1)
    assert is_live("77") is None
