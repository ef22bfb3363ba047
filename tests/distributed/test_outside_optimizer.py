"""An optimizer that one file adds: every layout moves as eager does, resumes bit for bit, and reshards."""

import pytest
import torch

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import EagerConfig, OptimizerConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.testing import snapshot, toy, toy_batch, train

LAYOUTS = {
    "eager": EagerConfig(),
    "stage 1": ZeroConfig(stage=1),
    "stage 2": ZeroConfig(stage=2),
    "stage 3": ZeroConfig(stage=3, param_persistence_threshold=0),
}
SGD = {"kind": "sgd", "lr": 0.1, "weight_decay": 0.0}


def build(comm, layout, seed=0):
    import momentum_sgd  # noqa: F401  # on the ranks alone, so that no other test meets it

    return build_engine(
        "toy",
        toy(seed),
        config=LAYOUTS[layout],
        optimizer=decode(OptimizerConfig, SGD),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=8 // comm.world,
        total_steps=20,
    )


def interrupted(comm):
    ends = {}
    for layout in LAYOUTS:
        first = build(comm, layout)
        losses, _ = train(first, comm, range(6))
        saved = snapshot(first, comm)
        straight, _ = train(first, comm, range(6, 12))
        second = build(comm, layout, seed=9)
        second.load(saved)
        resumed, _ = train(second, comm, range(6, 12))
        ends[layout] = (
            losses + straight,
            saved,
            resumed,
            snapshot(first, comm).whole(),
            snapshot(second, comm).whole(),
        )
    return ends


def resharded(comm, saved):
    """On one rank, from what two have saved."""
    ends = {}
    for layout, source in saved.items():
        engine = build(comm, layout, seed=9)
        engine.load(source)
        kept = snapshot(engine, comm).whole()
        ends[layout] = (kept, train(engine, comm, range(6, 12))[0])
    return ends


@pytest.fixture(scope="module")
def ends():
    return run_ranks(interrupted, 2)[0]


def test_every_layout_moves_as_plain_torch_does(ends):
    model = toy(0)()
    plain = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for step in range(12):
        loss = model(toy_batch(step, 8)).total
        losses.append(loss.item())
        plain.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        plain.step()
    assert losses[-1] < 0.9 * losses[0]
    for found, *_ in ends.values():
        assert found == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_bit_equal_with_its_momentum(ends, layout):
    losses, saved, resumed, straight, other = ends[layout]
    momentum = [value for (_, slot), value in saved.whole().items() if slot == "momentum_buffer"]
    assert momentum and any(value.abs().max() > 0 for value in momentum)
    assert resumed == losses[6:]
    assert straight.keys() == other.keys() and all(torch.equal(straight[key], other[key]) for key in straight)


def test_the_state_of_two_ranks_goes_on_on_one(ends):
    alone = run_ranks(resharded, 1, {layout: end[1] for layout, end in ends.items()})[0]
    for layout, (losses, saved, *_) in ends.items():
        kept, resumed = alone[layout]
        assert all(torch.equal(value, kept[key]) for key, value in saved.whole().items())
        assert resumed == pytest.approx(losses[6:], rel=1e-5)


def test_an_optimizer_that_nobody_added_is_answered_with_those_there_are():
    with pytest.raises(ConfigError, match=r"^optim\.kind: got 'sdg'; choose from adafactor, adamw, lion, muon"):
        decode(OptimizerConfig, {"kind": "sdg"}, where="optim")
