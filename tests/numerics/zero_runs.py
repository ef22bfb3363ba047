"""What the models' tests under ZeRO-3 share: a few steps on real ranks, and what must be equal to one plain process."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tokscale.base.batch import Batch
from tokscale.base.protocols import Engine
from tokscale.dist.comm import Comm
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, OptimizerConfig, ScheduleConfig, ZeroConfig
from tokscale.models.common import evaluating
from tokscale.nn.attention.observed import looking, observed
from tokscale.train.diagnostics import AttentionEntropy, spread

SIZE = 8
"""Samples of a global batch."""

Run = tuple[list[float], torch.Tensor]
"""Losses, and what the trained model then gave on a rank."""
Runs = Mapping[str, Run]
"""By case."""


def build(
    comm: Comm,
    make: Callable[[], nn.Module],
    *,
    dtype: Any = "fp32",
    optimizer: OptimizerConfig | None = None,
    micro_batches: int = 2,
) -> Engine:
    """One plain process, or ZeRO-3 with every parameter divided."""
    zero = ZeroConfig(stage=3, param_persistence_threshold=0, dtype=dtype)
    return build_engine(
        "model",
        make,
        config=EagerConfig(dtype=dtype) if comm.world == 1 else zero,
        optimizer=optimizer or AdamWConfig(lr=1e-2),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=micro_batches,
        micro_batch_size=SIZE // comm.world // micro_batches,
        total_steps=100,
    )


def train(
    engine: Engine, comm: Comm, batches: Callable[[int], Batch], *, steps: int = 8, micro_batches: int = 2
) -> list[float]:
    """The global loss of each step, every one applied."""
    losses = []
    for step in range(steps):
        total = 0.0
        for micro in batches(step).split(comm.world)[comm.rank].split(micro_batches):
            out = engine(micro)
            engine.backward(out.total)
            total += out.total.item() / micro_batches
        assert engine.step(step).applied
        losses.append(comm.mean({"loss": total})["loss"])
    return losses


def assert_entropies_are_the_whole_models(engine: Engine, comm: Comm, batch: Batch) -> None:
    """What the engine's forward pass tells of every attention, and what the whole model tells of the same samples."""
    told = dict(AttentionEntropy(1, engine, lambda: batch, comm=comm, seed=0).measure(0))
    assert told.pop("attention_entropy/seconds") > 0
    found: dict[str, list[float]] = {}

    def look(name: str, weights: torch.Tensor) -> None:
        found.setdefault(name, []).append(spread(weights))

    with engine.gathered() as model, evaluating(model), looking(observed(model), look):
        model(batch)
    assert told == pytest.approx({f"attention_entropy/{name}": sum(x) / len(x) for name, x in found.items()}, rel=1e-6)


def assert_losses_equal(case: str, eager: Runs, ranks: Sequence[Runs], *, falls_to: float = 0.9) -> None:
    """Losses on every rank are those of one process, and fall."""
    wanted, _ = eager[case]
    assert wanted[-1] < falls_to * wanted[0], "a loss that does not fall would hide a dead step"
    for rank in ranks:
        losses, _ = rank[case]
        assert losses[0] == pytest.approx(wanted[0], rel=1e-6)
        assert losses == pytest.approx(wanted, rel=1e-5)


def assert_codes_alike(case: str, eager: Runs, ranks: Sequence[Runs], *, agree: float = 0.99) -> None:
    """Sampled codes are the same on every rank, and nearly all are those of one process."""
    first, second = (rank[case][1] for rank in ranks)
    assert torch.equal(first, second)
    assert (first == eager[case][1]).float().mean() >= agree
