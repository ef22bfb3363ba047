"""What optimizers declare: shapes and dtypes of every sort are saved and come back; what is not declared is refused."""

from typing import Any, Literal

import pytest
import torch

from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig
from tokscale.engine.optimizer import OPTIMIZERS, AnyOptimizerConfig, ShardedOptimizer, Slot, optimizer
from tokscale.engine.testing import snapshot, toy, train

COMM = Comm(ProcessEnv(), device=torch.device("cpu"))


class OddConfig(AnyOptimizerConfig):
    """A half-precision mean, a number and a sum over rows for each parameter."""

    kind: Literal["odd"] = "odd"


@pytest.fixture
def odd():
    @optimizer(OddConfig)
    class Odd(ShardedOptimizer):
        forgets = False

        def __init__(self, params: list[dict[str, Any]], config: OddConfig):
            super().__init__(params, {"lr": config.lr, "weight_decay": 0.0})
            self.config = config

        @classmethod
        def slots(cls, config: OddConfig, shape: tuple[int, ...], group: str) -> tuple[Slot, ...]:
            return Slot("mean", dtype=torch.bfloat16), Slot("largest", ()), Slot("rows", shape[:1])

        @torch.no_grad()
        def step(self, closure=None) -> None:
            for data, master in self.masters.items():
                assert data.grad is not None
                (piece,) = master.slices
                self.kept(piece, "mean").lerp_(data.grad.view(-1).bfloat16(), 0.5)
                self.kept(piece, "largest").clamp_(min=data.grad.abs().max())
                self.kept(piece, "rows").add_(data.grad.abs().flatten(1).sum(1) if data.ndim > 1 else data.grad.abs())
                scale = self.kept(piece, "rows").view(-1, *[1] * (data.ndim - 1)) + self.kept(piece, "largest")
                data.sub_(self.kept(piece, "mean").view_as(data) / scale, alpha=0.1)
                if self.forgets:
                    self.state[data]["more"] = data.grad.clone()

    yield Odd
    OPTIMIZERS.remove("odd")


def engine(config, seed=0):
    return build_engine(
        "toy",
        toy(seed),
        config=EagerConfig(),
        optimizer=config,
        schedule=ScheduleConfig(kind="constant"),
        comm=COMM,
        micro_batches=1,
        micro_batch_size=8,
        total_steps=20,
    )


def test_state_of_any_shape_and_dtype_comes_back(odd):
    first = engine(OddConfig())
    losses, _ = train(first, COMM, range(4))
    assert losses[-1] < losses[0]
    saved = snapshot(first, COMM)
    found = {slot: value for (name, slot), value in saved.whole().items() if name == "blocks.0.0.weight"}
    assert found["mean"].dtype == torch.bfloat16 and found["mean"].shape == (30, 15)
    assert found["largest"].shape == () and found["largest"] > 0 and found["rows"].shape == (30,)
    second = engine(OddConfig(), seed=1)
    second.load(saved)
    assert train(second, COMM, range(4, 8))[0] == train(first, COMM, range(4, 8))[0]


def test_undeclared_state_is_refused_before_it_is_lost(odd, monkeypatch):
    monkeypatch.setattr(odd, "forgets", True)
    subject = engine(OddConfig())
    train(subject, COMM, range(1))
    with pytest.raises(TypeError, match="Odd keeps 'more' in its state, which `slots` does not declare"):
        list(subject.shards())


def test_state_that_a_step_replaces_is_refused():
    subject: Any = engine(AdamWConfig())
    train(subject, COMM, range(1))
    state = next(iter(subject.optimizer.state.values()))
    state["exp_avg"] = state["exp_avg"].clone()
    with pytest.raises(TypeError, match=r"AdamW keeps 'exp_avg'.* a step replaced"):
        list(subject.shards())


def test_an_optimizer_that_declares_nothing_cannot_be_added():
    class Careless(ShardedOptimizer):
        pass

    with pytest.raises(TypeError, match="optimizer Careless lacks slots"):
        optimizer(OddConfig)(Careless)
    assert "odd" not in OPTIMIZERS


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_declares_what_it_keeps(kind):
    subject: Any = engine(OPTIMIZERS[kind].config_class())
    train(subject, COMM, range(2))
    saved = {slot for _, slot in snapshot(subject, COMM).whole()} - {"weight", "buffer", "frozen"}
    declared = {
        slot.name
        for master in subject.optimizer.masters.values()
        for piece in master.slices
        for slot in subject.optimizer.slots_of(piece)
    }
    assert saved == declared and saved
