"""What a batch script does with the code of its stage: `slurm/lib/restart.sh` beside a scheduler of two lines."""

import os
import subprocess
from pathlib import Path

import pytest

RESTART = Path(__file__).parents[3] / "slurm" / "lib" / "restart.sh"


@pytest.fixture
def finish(tmp_path):
    """Gives the exit code of `finish <code>`, and what was asked of the scheduler."""
    tools, calls = tmp_path / "tools", tmp_path / "calls"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/bash\necho "$*" >>{calls}\necho "JobId=7 JobState=$STATE Requeue=1"\n')
    (tools / "sleep").write_text("#!/bin/bash\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)

    def run(code: int, *, state: str = "RUNNING", **variables: str) -> tuple[int, list[str]]:
        calls.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", "-euc", f'source "{RESTART}"; finish {code}'],
            env={"PATH": f"{tools}:{os.environ['PATH']}", "STATE": state, "SLURM_JOB_ID": "7"}
            | {"TOKSCALE_MAX_RESTARTS": "3"}
            | variables,
        )
        asked = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, [call for call in asked if call.startswith("requeue")]

    return run


@pytest.mark.parametrize("code", [0, 1, 64, 65, 69, 74, 75, 77, 78])
def test_a_stage_that_ended_by_itself_is_not_started_again(finish, code):
    assert finish(code) == (code, [])


@pytest.mark.parametrize("code", [76, 137, 143])
def test_ranks_that_were_lost_or_stalled_are_started_again(finish, code):
    assert finish(code) == (code, ["requeue 7"])
    assert finish(code, SLURM_RESTART_COUNT="2") == (code, ["requeue 7"])


def test_no_more_often_than_allowed_and_not_against_the_schedulers_will(finish):
    assert finish(137, SLURM_RESTART_COUNT="3") == (137, [])
    assert finish(137, TOKSCALE_MAX_RESTARTS="") == (137, [])
    assert finish(137, state="CANCELLED") == (137, [])


def test_a_task_of_an_array_requeues_itself_alone(finish):
    assert finish(137, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2") == (137, ["requeue 5_2"])
