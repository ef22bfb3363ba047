"""What is asked of the scheduler, with programs in its place that answer as Slurm 22.05 does."""

import signal
import time

import pytest

from tokscale.base.errors import EnvironmentRefused, StopRequested
from tokscale.dist.slurm import (
    EndOfAllocation,
    JobState,
    is_live,
    job_name,
    job_states,
    node_name,
    note_joined,
    note_kept,
    read_time,
    restarts,
    time_limit,
)


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


def stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))


def test_a_job_of_an_array_has_the_name_that_scontrol_wants():
    assert job_name({}) == "" and job_name({"SLURM_JOB_ID": "5"}) == "5"
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert job_name(array) == "7_2"
    assert restarts({}) == 0 and restarts({"SLURM_RESTART_COUNT": "2"}) == 2
    assert node_name({"SLURMD_NODENAME": "n2"}) == "n2" and node_name({})


def test_what_became_of_jobs(slurm):
    slurm("squeue", "printf '7|8|RUNNING|None|n1\\n7|9|PENDING|Resources|\\n12|12|PENDING|Dependency|\\n'")
    slurm("sacct", "[[ $5 == 13 ]] && echo 'CANCELLED by 0|None|n2'")
    slurm("scontrol", "[[ $4 == 14 ]] && echo 'JobId=14 JobState=FAILED Reason=NonZeroExitCode NodeList=n1'")
    states = job_states(["7", "9", "12", "13", "14", "15"])
    assert states["7"] == JobState("RUNNING", "", "n1")  # an array of which a task runs
    assert states["9"] == JobState("PENDING", "Resources") and states["12"] == JobState("PENDING", "Dependency")
    assert states["13"] == JobState("CANCELLED", "", "n2") and states["13"].over and not states["13"].well
    assert states["14"] == JobState("FAILED", "NonZeroExitCode", "n1")
    assert states["15"] == JobState("UNKNOWN") and not states["12"].over
    slurm("squeue", "printf '7|8|COMPLETED|None|n1\\n7|9|FAILED|NonZeroExitCode|n2\\n'")
    assert job_states(["7"])["7"] == JobState("FAILED", "NonZeroExitCode", "n2")


def test_in_a_container_the_batch_script_has_asked(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert is_live("78") is None and not EndOfAllocation(60).near()
    monkeypatch.setenv("TOKSCALE_LIVE_JOBS", "77,79")
    assert is_live("79") is True and is_live("78") is False
    monkeypatch.setenv("TOKSCALE_JOB_END", str(time.time() + 100))
    assert EndOfAllocation(120).near() and not EndOfAllocation(60).near()


def test_all_ranks_have_met_is_said_beside_the_outcome(tmp_path):
    note_joined({})
    note_joined({"TOKSCALE_OUTCOME": str(tmp_path / "7")})
    assert [path.name for path in tmp_path.iterdir()] == ["7.joined"]
    note_joined({"TOKSCALE_OUTCOME": "/nowhere/7"})  # no reason to fail


def test_a_warning_ends_a_stage_that_keeps_nothing(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    environ = {"TOKSCALE_OUTCOME": str(tmp_path / "7")}
    with pytest.raises(EnvironmentRefused, match="too short for export.*cluster.stages.export.time"):  # noqa: SIM117
        with time_limit("export", environ):
            signal.raise_signal(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == before
    with time_limit("export", {}):
        assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize(
    ("stage", "number", "kept", "left", "expected"),
    [
        ("prepare", signal.SIGUSR1, 1, 60, StopRequested),  # the next start goes on from what was kept
        ("prepare", signal.SIGUSR1, 0, 60, EnvironmentRefused),
        ("export", signal.SIGTERM, 0, 60, StopRequested),  # preempted, which says nothing of the time
        ("train", signal.SIGUSR1, 0, 60, EnvironmentRefused),  # all its time went by before the first step
        ("train", signal.SIGUSR1, 0, 7200, StopRequested),  # an operator's wish
    ],
)
def test_who_is_warned_comes_again_if_it_would_get_further(stage, number, kept, left, expected, tmp_path):
    environ = {"TOKSCALE_OUTCOME": str(tmp_path / "7"), "TOKSCALE_JOB_END": str(time.time() + left)}
    environ |= {"SLURM_JOB_NAME": "tokscale-prepare"}
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    with pytest.raises(expected) as raised:  # noqa: SIM117
        with time_limit(stage, environ):
            for _ in range(kept):
                note_kept()
            try:
                signal.raise_signal(number)
            except Exception:
                pytest.fail("a handler of failures took the warning for one of its own")
    assert getattr(raised.value, "again", False) == (expected is StopRequested)
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)] == before


@pytest.mark.parametrize(("seconds", "expected"), [("900", EnvironmentRefused), ("300", StopRequested)])
def test_a_warning_long_before_the_end_is_one_all_the_same(tmp_path, seconds, expected):
    """Else a job that is warned before its first step would come again for ever."""
    environ = {"TOKSCALE_OUTCOME": str(tmp_path / "7"), "TOKSCALE_JOB_END": str(time.time() + 950)}
    with pytest.raises(expected):  # noqa: SIM117
        with time_limit("train", environ | {"TOKSCALE_SIGNAL_SECONDS": seconds}):
            signal.raise_signal(signal.SIGUSR1)


def test_of_several_ranks_the_end_of_the_others_is_no_preemption(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with time_limit("train", {"TOKSCALE_OUTCOME": str(tmp_path / "7"), "SLURM_STEP_NUM_TASKS": "2"}):
        assert signal.getsignal(signal.SIGTERM) == before  # srun's, after another rank has failed


@pytest.mark.parametrize(
    ("job", "key"),
    [("tokenize-close", "tokenize-close"), ("embed", "embed"), ("embed-close", "embed-close"), ("mine", "tokenize")],
)
def test_the_way_out_names_the_key_of_the_job(tmp_path, job, key):
    """Jobs that run one program have limits of their own; a name that a person gave is none of ours."""
    environ = {"TOKSCALE_OUTCOME": str(tmp_path / "7"), "TOKSCALE_JOB_END": str(time.time() + 60)}
    with pytest.raises(EnvironmentRefused, match=f"too short for {key}: .*cluster.stages.{key}.time=HOURS"):  # noqa: SIM117
        with time_limit("tokenize", environ | {"SLURM_JOB_NAME": f"tokscale-{job}"}):
            signal.raise_signal(signal.SIGUSR1)


def test_a_scheduler_that_does_not_answer_is_no_failure(slurm, monkeypatch):
    slurm("scontrol", "echo nonsense >&2", code=1)
    assert not EndOfAllocation(60, "77").near()
    monkeypatch.setenv("PATH", "/nowhere")
    assert is_live("77") is None


def test_the_end_of_the_time_is_near_within_the_margin(slurm):
    slurm("scontrol", f'echo "StartTime={stamp(-3600)} EndTime={stamp(100)}"')
    assert EndOfAllocation(120, "77").near() and not EndOfAllocation(60, "77").near()
    assert EndOfAllocation(60, "77").near(needed=120)  # a slow file system
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
