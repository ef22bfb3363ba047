"""Keys that change in the middle of a run, on the record; and going back to an earlier step without losing any."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tokscale.base.errors import CheckpointError
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.testing import Flat, alone
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine.config import AdamWConfig, OptimizerConfig, ScheduleConfig
from tokscale.runs.run_folder import RunConfigMismatchError, locked_run_dir, refuse_another_run
from tokscale.runs.segments import ResumableConfig, cut_is_due, is_recordable, read_segments
from tokscale.stages.status import lines
from tokscale.train.loop import LoopConfig


class TrainLike(ResumableConfig):
    optim: OptimizerConfig = AdamWConfig(lr=0.01)
    schedule: ScheduleConfig = ScheduleConfig(kind="cosine", warmup_steps=2, final_ratio=0.1)
    loop: LoopConfig = LoopConfig(total_steps=20)
    batch_size: int = 8
    dim: int = 4


def config(folder: Path, **values) -> TrainLike:
    return TrainLike.model_validate({"run_dir": folder, **values})


def started(folder: Path, **values) -> TrainLike:
    made = config(folder, **values)
    with locked_run_dir(folder, "train", made, Comm(ProcessEnv())):
        pass
    return made


def saved(folder: Path, *steps: int) -> None:
    store = CheckpointStore(folder / "checkpoints", CheckpointConfig(keep_last=9), alone())
    for step in steps:
        store.save(step, {"model": Flat({("w", "weight"): torch.full((2,), float(step))})}, {})


def there(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step_*"))


@pytest.fixture
def run(tmp_path) -> Path:
    started(tmp_path)
    saved(tmp_path, 5, 10, 15)
    return tmp_path


def test_another_learning_rate_is_refused_with_a_way_out_that_is_accepted(run):
    with pytest.raises(RunConfigMismatchError, match=r"optim.lr is 0.01 there and 0.005 here.*or on_change=record"):
        started(run, optim={"kind": "adamw", "lr": 0.005})
    assert read_segments(run) == []
    started(run, optim={"kind": "adamw", "lr": 0.005}, on_change="record")
    (segment,) = read_segments(run)
    assert segment["from_step"] == 15 and segment["changes"] == {"optim.lr": [0.01, 0.005]}
    started(run, optim={"kind": "adamw", "lr": 0.005})  # from now on it is this run's
    assert len(read_segments(run)) == 1
    assert any("from step 15 on: optim.lr 0.01 -> 0.005" in line for line in lines(run))


@pytest.mark.parametrize(
    ("changed", "recordable"),
    [
        ({"batch_size": 16}, True),
        ({"schedule": {"kind": "constant"}}, True),
        ({"optim": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.3}}, True),
        ({"optim": {"kind": "lion", "lr": 0.01}}, False),
        ({"dim": 8}, False),
        ({"dim": 8, "batch_size": 16}, False),
        ({"seed": 3}, False),
    ],
)
def test_what_can_be_changed_in_the_middle_and_what_cannot(run, changed, recordable):
    with pytest.raises(RunConfigMismatchError) as caught:
        refuse_another_run(run, "train", config(run, **changed))
    assert ("on_change=record" in str(caught.value)) is recordable
    if recordable:
        started(run, on_change="record", **changed)
        assert len(read_segments(run)) == 1
    else:
        with pytest.raises(RunConfigMismatchError):
            started(run, on_change="record", **changed)


def test_extending_a_finished_run_names_both_learning_rates_and_asks_for_the_key(run):
    started(run, loop={"total_steps": 30})  # not finished yet
    started(run, loop={"total_steps": 20})
    saved(run, 20)
    with pytest.raises(RunConfigMismatchError, match=r"from 0.001 to 0.0088\d* at step 20; on_change=record"):
        started(run, loop={"total_steps": 80})
    started(run, loop={"total_steps": 80}, on_change="record")
    (segment,) = read_segments(run)
    assert segment["changes"]["loop.total_steps"] == [20, 80]
    old, new = segment["changes"]["learning rate at step 20"]
    assert old == pytest.approx(0.001) and 0.008 < new < 0.01
    assert any("learning rate at step 20 0.001 -> 0.0088" in line for line in lines(run))


def test_a_longer_run_whose_learning_rate_stays_needs_no_key(tmp_path):
    constant = {"schedule": {"kind": "constant"}}
    started(tmp_path, **constant)
    saved(tmp_path, 20)
    started(tmp_path, loop={"total_steps": 80}, **constant)
    assert read_segments(tmp_path) == []


def test_going_back_sets_later_checkpoints_aside_once(run):
    (run / "metrics.jsonl").write_text('{"step": 15}\n')
    lower = {"optim": {"kind": "adamw", "lr": 0.005}, "on_change": "record", "resume_from": 5}
    assert cut_is_due(run, config(run, **lower))
    started(run, **lower)
    assert there(run / "checkpoints") == [5]
    (aside,) = (run / "checkpoints/set_aside").iterdir()
    assert there(aside) == [10, 15] and (aside / "metrics.jsonl").read_text() == '{"step": 15}\n'
    (segment,) = read_segments(run)
    assert segment["from_step"] == segment["resume_from"] == 5 and segment["set_aside"] in f"{aside}"
    saved(run, 8)
    assert not cut_is_due(run, config(run, **lower))
    started(run, **lower)  # a scheduler starts the same command again
    assert there(run / "checkpoints") == [5, 8] and len(read_segments(run)) == 1
    started(run, **lower | {"optim": {"kind": "adamw", "lr": 0.002}})  # but another rate begins there anew
    assert there(run / "checkpoints") == [5] and len(read_segments(run)) == 2
    assert sorted(path.name for path in run.glob("checkpoints/set_aside/*/step_*"))[-1] == "step_000000015"


def test_a_step_that_is_not_saved_is_refused_before_anything_moves(run):
    with pytest.raises(CheckpointError, match="resume_from=7: no such checkpoint; there are steps 5, 10, 15"):
        started(run, resume_from=7)
    (run / "checkpoints/step_000000010/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        started(run, resume_from=10)
    assert there(run / "checkpoints") == [5, 10, 15] and read_segments(run) == []


def test_the_recipe_that_repeats_the_run_does_not_go_back_again(run):
    started(run, resume_from=5)
    values = yaml.safe_load((run / "config.yaml").read_text())["train"]
    assert not {"resume_from", "on_change"} & values.keys()
    assert json.loads((run / "segments.json").read_text())["segments"][0]["changes"] == {}


def test_only_what_leaves_the_moments_as_they_are_is_recordable():
    assert is_recordable("optim.betas") and is_recordable("engine.gradient_clipping")
    assert not any(map(is_recordable, ("optim.kind", "engine.dtype", "model.dim", "optimum", "data.shuffle")))
