"""One step of a single model: micro batches average to the whole batch, and every metric has its name."""

import pytest
import torch

from tokscale.base.batch import LossOutput
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig
from tokscale.engine.testing import ToyModel, toy, toy_batch
from tokscale.train.task import SingleModelTask


class Annealed(ToyModel):
    """Notes the step it was annealed for, and adds a metric worth plotting."""

    def forward(self, batch) -> LossOutput:
        output = super().forward(batch)
        return LossOutput(output.total, output.parts, metrics={"rows": torch.tensor(len(batch.ids))})

    def anneal(self, step: int) -> None:
        self.annealed = step


def task(micro_batches: int, make=None) -> SingleModelTask:
    engine = build_engine(
        "model",
        make or toy(),
        config=EagerConfig(),
        optimizer=AdamWConfig(lr=1e-2),
        schedule=ScheduleConfig(kind="constant"),
        comm=Comm(ProcessEnv()),
        micro_batches=micro_batches,
        micro_batch_size=8 // micro_batches,
        total_steps=10,
    )
    return SingleModelTask(engine, micro_batches)


def test_micro_batches_take_the_step_of_the_whole_batch():
    whole, split = task(1), task(4)
    for step in range(3):
        batch = toy_batch(step, 8)
        one, four = whole.step(batch, step), split.step(batch, step)
        assert four.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-5)
        assert four.reports["model"].grad_norm == pytest.approx(one.reports["model"].grad_norm, rel=1e-4)
    assert one.metrics["loss"] < 3.0


def test_metrics_are_named_and_averaged():
    made = task(2, make=Annealed)
    result = made.step(toy_batch(0, 8), 5)
    assert result.metrics.keys() == {"loss", "loss/token", "rows"}
    assert result.metrics["rows"] == 4.0 and result.reports["model"].applied
    assert result.metrics["loss"] == result.metrics["loss/token"]
    assert made.engines["model"].model.annealed == 5


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="8 samples does not split into 3"):
        task(3).step(toy_batch(0, 8), 0)
