"""State passes between engines, stages and numbers of ranks without losing a bit, and each byte is read once."""

import pytest
import torch

from tokscale.base.errors import CheckpointError
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.testing import MemorySource, snapshot, toy, toy_batch, train

BATCH = 12
EMA = (0.9, 0.999)
LAYOUTS = {
    "eager": EagerConfig(ema=EMA),
    "stage 1": ZeroConfig(stage=1, ema=EMA),
    "stage 3, small parameters whole": ZeroConfig(stage=3, param_persistence_threshold=200, ema=EMA),
    "stage 2, offloaded": ZeroConfig(stage=2, offload_optimizer=True, ema=EMA),
    "stage 0": ZeroConfig(stage=0, ema=EMA),
    "stage 3, bf16": ZeroConfig(stage=3, dtype="bf16", param_persistence_threshold=0, ema=EMA),
    "stage 1, bf16": ZeroConfig(stage=1, dtype="bf16", ema=EMA),
    "stage 3, offloaded": ZeroConfig(stage=3, offload_optimizer=True, param_persistence_threshold=0, ema=EMA),
    "stage 2": ZeroConfig(stage=2, ema=EMA),
    "stage 2, bf16": ZeroConfig(stage=2, dtype="bf16", ema=EMA),
    "stage 3": ZeroConfig(stage=3, param_persistence_threshold=0, ema=EMA),
}


def build(comm, config, seed, weight_decay=0.1):
    return build_engine(
        "toy",
        toy(seed),
        config=config,
        optimizer=AdamWConfig(lr=1e-2, weight_decay=weight_decay),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=BATCH // comm.world,
        total_steps=20,
    )


def start(comm):
    """A trained state in which every value differs from its initial one, the buffer and the frozen layer included."""
    subject = build(comm, LAYOUTS["stage 3"], seed=0)
    train(subject, comm, range(3), batch=BATCH)
    source = snapshot(subject, comm)
    for (name, slot), value in source.whole().items():
        if slot in ("buffer", "frozen"):  # values that bf16 holds exactly
            value.copy_((torch.arange(value.numel()) + len(name)).view(value.shape) % 60 / 512)
    return source


def pass_on(comm, source, names):
    """Load `source` into each layout in turn, each time from the snapshot of the one before."""
    reports = []
    for name in names:
        before = source.elements_read
        subject = build(comm, LAYOUTS[name], seed=5, weight_decay=0.9)
        subject.load(source)
        read = comm.sum({"read": source.elements_read - before})["read"]
        loss = comm.mean({"loss": subject(toy_batch(7, BATCH).split(comm.world)[comm.rank]).total.item()})["loss"]
        source = snapshot(subject, comm)
        reports.append((name, read, loss))
    final = build(comm, LAYOUTS[names[-1]], seed=5)
    final.load(source)
    losses, _ = train(final, comm, range(3, 6), batch=BATCH)
    return source, reports, losses


@pytest.fixture(scope="module")
def journey():
    """2 ranks -> 1 -> 3, through every layout."""
    names = list(LAYOUTS)
    origin = run_ranks(start, 2)[0]
    reference = run_ranks(pass_on, 1, origin, ["eager"])[0]
    alone = run_ranks(pass_on, 1, origin, names)[0]
    together = run_ranks(pass_on, 3, alone[0], names[::-2])
    return origin, reference, [alone, *together]


def test_every_bit_survives_the_journey(journey):
    origin, _, ends = journey
    for source, _, _ in ends:
        assert source.names() and set(source.names()) == set(origin.names())
        for key, value in origin.whole().items():
            found = source.whole()[key]
            assert torch.equal(found.to(value.dtype), value), key
        assert source.scalars == origin.scalars


def test_each_element_is_read_once_over_all_ranks(journey):
    origin, _, ends = journey
    size = sum(value.numel() for value in origin.whole().values())
    for _, reports, _ in ends:
        for name, read, _ in reports:
            assert read == size, name


def test_forward_sees_the_loaded_weights_and_training_goes_on_alike(journey):
    _, (_, [(_, _, expected)], losses), ends = journey
    for _, reports, later in ends:
        for name, _, loss in reports:
            assert loss == pytest.approx(expected, rel=1e-2 if "bf16" in name else 1e-6), name
        exact = reports[-1][0]
        assert later == pytest.approx(losses, rel=1e-2 if "bf16" in exact else 1e-5), exact


class Torn(MemorySource):
    """A checkpoint of which one rank cannot read one tensor."""

    rank = None

    def read(self, name, slot, start, stop):
        if self.rank == 1 and name == "blocks.1.0.weight":
            raise CheckpointError("shard 1 is torn")
        return super().read(name, slot, start, stop)


def load_torn(comm, source):
    source.__class__ = Torn
    source.rank = comm.rank
    messages = []
    for name in ("eager", "stage 1", "stage 3"):
        try:
            build(comm, LAYOUTS[name], seed=1).load(source)
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def test_a_failed_read_on_one_rank_is_an_error_on_all():
    first, second = run_ranks(load_torn, 2, run_ranks(start, 1)[0])
    assert second == ["shard 1 is torn"] * 3
    assert first == ["reading the checkpoint failed on rank 1: shard 1 is torn"] * 3


def resume(comm, config_name):
    config = LAYOUTS[config_name]
    straight, _ = train(build(comm, config, seed=0), comm, range(6), batch=BATCH)
    first = build(comm, config, seed=0)
    train(first, comm, range(3), batch=BATCH)
    second = build(comm, config, seed=1)
    second.load(snapshot(first, comm))
    resumed, _ = train(second, comm, range(3, 6), batch=BATCH)
    return straight[3:], resumed


def resume_all(comm):
    return [resume(comm, name) for name in ("eager", "stage 1", "stage 2, offloaded", "stage 2, bf16", "stage 3")]


def test_a_resumed_run_is_bit_equal_at_the_same_world_size():
    for straight, resumed in run_ranks(resume_all, 2)[0]:
        assert resumed == straight
