"""What a person is told of a run folder."""

import json
from pathlib import Path

import pytest

from tokscale.base.config import Config
from tokscale.base.errors import DataError
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.runs.outcome import Attempt
from tokscale.runs.run_folder import locked_run_dir
from tokscale.runs.stage import StageConfig, StageResult
from tokscale.stages import status

ALONE = ProcessEnv()


class Model(Config):
    kind: str = "dalle"


class TrainLike(StageConfig):
    model: Model = Model()
    loop: dict[str, int] = {"total_steps": 30}
    batch_size: int = 8


@pytest.fixture
def run_dir(tmp_path) -> Path:
    with locked_run_dir(tmp_path / "run", "train", TrainLike(), Comm(ALONE)):
        rows = [{"step": step, "time": 0.0, "loss": 3.0 - step, "mfu": None} for step in (1, 2)]
        (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "run/checkpoints/step_000000002").mkdir(parents=True)
    return tmp_path / "run"


def told(folder: Path) -> str:
    return "\n".join(status.lines(folder))


def test_a_run_under_way(run_dir):
    with locked_run_dir(run_dir, "train", TrainLike(), Comm(ALONE)):
        said = told(run_dir)
    assert "run of train: dalle, 30 steps of 8 samples" in said
    assert "in use by " in said and "not in use" not in said
    assert "step 2: loss 1" in said and "mfu" not in said


def test_an_unfinished_checkpoint_is_called_one(run_dir):
    said = told(run_dir)
    assert "not in use" in said and "manifest.json: missing, so the checkpoint was never finished" in said


def test_how_it_ended(run_dir):
    Attempt(run_dir, "train", ALONE).succeed(StageResult("dalle at step 2"), seconds=12.3)
    assert "train done in 12 s: dalle at step 2" in told(run_dir)
    (run_dir / "exit.json").unlink()
    Attempt(run_dir, "train", ALONE).fail(65, DataError("shard 7 is torn"))
    assert "train with code 65: DataError: shard 7 is torn" in told(run_dir)


def test_the_stage_shows_the_folder_and_the_runs_below_it(run_dir, capsys):
    status.run(status.StatusConfig(run_dir=run_dir.parent), ALONE)
    said = capsys.readouterr().out
    assert "nothing that a stage of tokscale made" in said and f"{run_dir}\n  run of train" in said


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such folder; give run_dir=FOLDER"):
        status.run(status.StatusConfig(run_dir=tmp_path / "gone"), ALONE)


def test_a_run_under_way_is_told_with_its_pace_and_its_newest_images(tmp_path):
    (tmp_path / "samples").mkdir()
    for step in (10, 200):
        (tmp_path / f"samples/step_{step:09d}.png").touch()
    (tmp_path / "config.yaml").write_text("train: {loop: {total_steps: 400}}\n")
    rows = [{"step": n, "time": 1000.0 + 3 * n, "loss": 2.0, "held_out/loss": 2.5} for n in range(10, 101, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = list(status.lines(tmp_path))
    assert "step 100: loss 2, held_out/loss 2.5" in told
    assert "100 of 400 steps (25%), 0:15:00 left at 0.333 steps/s" in told
    assert f"newest images: {tmp_path}/samples/step_000000200.png" in told
    rows[-1]["step"] = 400
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not any("left" in line for line in status.lines(tmp_path))


def test_watching_looks_again_while_a_job_is_at_work(tmp_path, monkeypatch, capsys):
    looks = iter([True, True, False])
    monkeypatch.setattr(status, "holder", lambda folder: None)
    monkeypatch.setattr(status, "_at_work", lambda folders: next(looks))
    waited: list[float] = []
    monkeypatch.setattr(status.time, "sleep", waited.append)
    status.run(status.StatusConfig(run_dir=tmp_path, watch=7), ALONE)
    assert waited == [7, 7] and capsys.readouterr().out.count("nothing that a stage") == 3
