"""`init_from`: a new run begins with other weights, once; it never takes the place of resuming."""

from pathlib import Path

import pytest
import tiny_pipeline

from tokscale.base.config import decode
from tokscale.base.errors import CheckpointError
from tokscale.dist.env import ProcessEnv
from tokscale.stages import export, train
from tokscale.train.metrics import read_metrics


def config(pipeline: Path, run_dir: Path, steps: int, **values) -> train.TrainConfig:
    return decode(
        train.TrainConfig,
        {
            "run_dir": run_dir,
            "data_dir": pipeline / "data",
            "image_tokenizer": pipeline / "image_tokenizer",
            "text_tokenizer": pipeline / "text_tokenizer",
            "model": tiny_pipeline.MODEL,
            "optim": {"lr": 1e-2},
            "schedule": {"kind": "constant"},
            "loop": {"total_steps": steps, "log_every": 1},
            "checkpoint": {"every_steps": 2},
            "batch_size": 8,
        }
        | values,
    )


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> tuple[Path, Path]:
    """Inputs, and a run of twelve steps on them with its export."""
    pipeline, run_dir = tmp_path_factory.mktemp("pipeline"), tmp_path_factory.mktemp("parent")
    tiny_pipeline.make_inputs(pipeline)
    train.run(config(pipeline, run_dir, 12), ProcessEnv())
    export.run(export.ExportConfig(run_dir=run_dir), ProcessEnv())
    return pipeline, run_dir


@pytest.mark.parametrize("kind", ["export", "checkpoints"])
def test_a_new_run_begins_where_another_ended_and_then_goes_on_by_itself(parent, tmp_path, kind):
    pipeline, origin = parent
    train.run(config(pipeline, tmp_path, 2, init_from=origin / kind), ProcessEnv())
    before = [row["loss"] for row in read_metrics(origin)]
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert losses[0] < 0.9 * before[0] and losses[0] != before[-1]
    assert read_metrics(tmp_path)[0]["step"] == 1


def test_what_does_not_fit_is_refused_unless_it_is_named(parent, tmp_path):
    pipeline, origin = parent
    wider = tiny_pipeline.MODEL | {"text_seq_len": tiny_pipeline.MODEL["text_seq_len"] + 1}
    with pytest.raises(CheckpointError, match="tensors do not fit the model"):
        train.run(config(pipeline, tmp_path, 2, model=wider, init_from=origin / "export"), ProcessEnv())
