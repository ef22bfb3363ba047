"""Every shipped optimizer under ZeRO: the eager trajectory, and state that passes between layouts bit for bit."""

import pytest
import torch

from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import (
    AdafactorConfig,
    AdamWConfig,
    EagerConfig,
    LionConfig,
    MuonConfig,
    ScheduleConfig,
    ZeroConfig,
)
from tokscale.engine.testing import snapshot, toy, toy_batch, train

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


EMA = (0.9, 0.99)
GUARDED = [
    EagerConfig(ema=EMA),
    ZeroConfig(stage=1, ema=EMA),
    ZeroConfig(stage=3, param_persistence_threshold=0, ema=EMA),
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


def dropped(comm):
    """States before and after a step whose gradient is NaN on the last rank alone, and after a sound one."""
    from momentum_sgd import SGDConfig  # on the ranks alone, so that no other test meets it

    found = []
    for optimizer in [AdamWConfig(lr=1e-2), SGDConfig(lr=0.1, weight_decay=0.0), *OPTIMIZERS[:-1]]:
        for layout in GUARDED:
            subject = build(comm, layout, optimizer)
            train(subject, comm, range(2))
            before = snapshot(subject, comm)
            batch = toy_batch(2, 8 // comm.world)
            loss = subject(batch).total
            subject.backward(loss * (torch.nan if comm.rank + 1 == comm.world else 1.0))
            applied = subject.step(2).applied
            after = snapshot(subject, comm)
            train(subject, comm, range(3, 4))
            case = f"{optimizer.kind} {layout.kind} {getattr(layout, 'stage', '')}"
            found.append((case, applied, before, after, snapshot(subject, comm)))
    return found


def test_a_step_that_is_not_finite_changes_no_bit_of_any_optimizer_or_average():
    for case, applied, before, after, later in run_ranks(dropped, 2)[0]:
        kept, next_ = before.whole(), later.whole()
        assert not applied, case
        assert (after.scalars["updates"], after.scalars["skipped"], later.scalars["updates"]) == (2, 1, 3), case
        assert kept.keys() == after.whole().keys() and {"ema/0.9", "ema/0.99"} <= {slot for _, slot in kept}
        for key, value in after.whole().items():
            assert torch.equal(value, kept[key]), (case, key)
        # Each slot of each weight that trains moves again with the next sound step, by finite numbers.
        still = [key for key, value in kept.items() if torch.equal(value, next_[key])]
        assert {slot for _, slot in still} <= {"buffer", "frozen"} and all(map(_finite, next_.values())), (case, still)


def _finite(value):
    return bool(value.isfinite().all())
