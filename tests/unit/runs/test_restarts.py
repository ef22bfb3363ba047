"""A job that is started again and again at the same step is not started for ever."""

import pytest

from tokscale.base.errors import EnvironmentRefused
from tokscale.runs import restarts


def start(folder, monkeypatch, job: str, count: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))
    restarts.note_start(folder)


def test_a_job_that_saved_nothing_at_three_starts_is_refused_the_fourth(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    for count in range(restarts.IDLE_STARTS):
        start(tmp_path, monkeypatch, "7", count)
    with pytest.raises(EnvironmentRefused, match="job 7 was started 4 times at step 0"):
        start(tmp_path, monkeypatch, "7", restarts.IDLE_STARTS)
    start(tmp_path, monkeypatch, "8", 1)  # the failures of another job are not its own
    assert [row["job"] for row in restarts.read_starts(tmp_path)] == ["7"] * 4 + ["8"]
