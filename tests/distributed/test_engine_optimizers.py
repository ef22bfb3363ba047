"""Every shipped optimizer under ZeRO: the eager trajectory, and state that passes between layouts bit for bit."""

import pytest
import torch

from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdafactorConfig, EagerConfig, LionConfig, MuonConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.testing import snapshot, toy, train

# The toy's matrices are 23x15 and 30x15, so with these some are factored and some are not.
OPTIMIZERS = [
    LionConfig(lr=1e-3),
    MuonConfig(lr=1e-2),
    AdafactorConfig(lr=1e-2, min_factor=15),
    AdafactorConfig(lr=1e-2, min_factor=16),
]
LAYOUTS = [
    EagerConfig(),
    ZeroConfig(stage=1),
    ZeroConfig(stage=2, offload_optimizer=True),
    ZeroConfig(stage=3, param_persistence_threshold=0),
    ZeroConfig(stage=0),
    ZeroConfig(stage=3, offload_optimizer=True),
    ZeroConfig(stage=2),
]


def build(comm, config, optimizer, seed=0):
    return build_engine(
        "toy",
        toy(seed),
        config=config,
        optimizer=optimizer,
        schedule=ScheduleConfig(kind="linear"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=8 // comm.world,
        total_steps=20,
    )


def trajectories(comm):
    return [
        [train(build(comm, layout, optimizer), comm, range(20))[0] for layout in LAYOUTS] for optimizer in OPTIMIZERS
    ]


def test_every_layout_follows_eager():
    for eager, *others in run_ranks(trajectories, 2)[0]:
        assert eager[-1] < 0.9 * eager[0]
        for losses in others:
            assert losses == pytest.approx(eager, rel=1e-5)


def chain(comm):
    ends = []
    for optimizer in OPTIMIZERS:
        first = build(comm, LAYOUTS[3], optimizer)
        train(first, comm, range(3))
        origin = source = snapshot(first, comm)
        for layout in LAYOUTS:
            subject = build(comm, layout, optimizer, seed=9)
            subject.load(source)
            source = snapshot(subject, comm)
        straight, _ = train(first, comm, range(3, 5))
        resumed, _ = train(subject, comm, range(3, 5))
        ends.append((origin, source, straight, resumed))
    return ends


def test_state_passes_between_layouts():
    for origin, final, straight, resumed in run_ranks(chain, 2)[0]:
        assert origin.scalars == final.scalars
        assert set(origin.whole()) == set(final.whole())
        assert all(torch.equal(value, final.whole()[key]) for key, value in origin.whole().items())
        assert resumed == pytest.approx(straight, rel=1e-6)
    slots = {slot for _, slot in origin.whole()}
    assert {"exp_avg", "exp_avg_sq", "weight"} <= slots and "exp_avg_sq_row" not in slots
