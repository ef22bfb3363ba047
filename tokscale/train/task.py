"""What one training step means: between the loop, which knows no model, and the engine, which knows no batch."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from tokscale.base.batch import Batch, Carried, LossOutput, StepResult
from tokscale.base.protocols import Engine, LossModel


class SingleModelTask:
    """One model, one loss, one engine: every transformer and the plain tokenizers."""

    def __init__(self, engine: Engine, micro_batches: int = 1):
        """Train `engine` with each batch split into `micro_batches` equal parts whose gradients are averaged."""
        self.engines: Mapping[str, Engine] = {engine.name: engine}
        self._engine = engine
        self._micro_batches = micro_batches

    def step(self, batch: Batch, step: int) -> StepResult:
        """Forward and backward over the micro batches, then one update."""
        engine = self._engine
        cast(LossModel, engine.model).anneal(step)
        outputs = []
        for micro_batch in batch.to(engine.device).split(self._micro_batches):
            output = engine(micro_batch)
            engine.backward(output.total)
            outputs.append(named_scalars(output))
        means = mean_scalars(outputs)
        engine.carry(means)
        report = engine.step(step)
        return StepResult(metrics=Carried(report, means), reports={engine.name: report}, averaged=True)

    def state_dict(self) -> dict[str, Any]:
        """Nothing beyond the engine's own state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        del state


def named_scalars(output: LossOutput) -> dict[str, Tensor]:
    """The metrics of one forward pass under the names they are plotted by: `loss`, `loss/<part>`, metrics as named."""
    parts = {f"loss/{name}": part for name, part in output.parts.items()}
    return {name: value.detach() for name, value in {"loss": output.total, **parts, **output.metrics}.items()}


def mean_scalars(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean over micro batches in float64, on the device: nothing waits."""
    first, *others = outputs
    if not others:
        return first
    columns = [torch.stack([output[name] for output in outputs]) for name in first]
    return dict(zip(first, torch.stack([column.to(torch.float64) for column in columns]).mean(1), strict=True))
