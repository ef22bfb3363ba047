"""Checkpoints of real engines: any engine and world size to any other, bit for bit, and training goes on unmoved."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.reader import Checkpoint
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.warmstart import warm_start
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, EngineConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.testing import snapshot, toy, train

BATCH = 12
TOTAL = 20
EMA = (0.9, 0.99)


def eager() -> EagerConfig:
    return EagerConfig(ema=EMA)


def zero(stage: int, **options: Any) -> ZeroConfig:
    return ZeroConfig(
        stage=stage, ema=EMA, gradient_clipping=1.0, reduce_bucket_size=200, param_persistence_threshold=0, **options
    )


def build(comm: Comm, config: EngineConfig, seed: int = 0):
    return build_engine(
        "model",
        toy(seed),
        config=config,
        optimizer=AdamWConfig(lr=1e-2, weight_decay=0.1),
        schedule=ScheduleConfig(kind="linear", warmup_steps=3),
        comm=comm,
        micro_batches=1,
        micro_batch_size=BATCH // comm.world,
        total_steps=TOTAL,
    )


def whole(checkpoint: Checkpoint) -> dict[tuple[str, str], torch.Tensor]:
    """Every stored tensor, flat."""
    with checkpoint.source("model") as source:
        return {
            (name, slot): source.read(name, slot, 0, torch.Size(source.shape(name, slot)).numel())
            for name in source.names()
            for slot in source.slots(name)
        }


def leg(comm: Comm, folder: Path, configs: list[EngineConfig], step: int, steps: int) -> list[dict[str, Any]]:
    """Engine after engine in one job: resume from the newest checkpoint, train `steps`, save, say what was read."""
    seen = []
    for config in configs:
        engine = build(comm, config, seed=7)  # other weights than those it must take over
        store = CheckpointStore(folder, CheckpointConfig(keep_last=50, async_save=step % 2 == 0), comm)
        found, read = store.newest(), 0
        if found is not None:
            with found.source("model") as source:
                engine.load(source)
                read = source.bytes_read
        first = 0 if found is None else found.state["next"]
        losses, _ = train(engine, comm, range(first, first + steps), batch=BATCH)
        step += 1
        store.save(step, {"model": engine}, {"next": first + steps})
        store.close()
        seen.append({"losses": losses, "read": read, "scalars": dict(engine.scalars())})
    return seen


def start(folder: Path, steps: int) -> None:
    comm = Comm(ProcessEnv(), device=torch.device("cpu"))
    engine = build(comm, eager())
    train(engine, comm, range(steps), batch=BATCH)
    CheckpointStore(folder, CheckpointConfig(keep_last=50), comm).save(1, {"model": engine}, {"next": steps})


def oracle(steps: int) -> tuple[list[float], dict[tuple[str, str], torch.Tensor]]:
    comm = Comm(ProcessEnv(), device=torch.device("cpu"))
    engine = build(comm, eager())
    losses, _ = train(engine, comm, range(steps), batch=BATCH)
    return losses, {key: value.flatten() for key, value in snapshot(engine, comm).whole().items()}


def assert_pure_chain(folder: Path, legs: list[list[dict[str, Any]]], saves: int) -> None:
    """Nothing was trained: every checkpoint holds the first one's bits, and was read once over all ranks."""
    first = Checkpoint(folder / "step_000000001")
    expected, size = whole(first), first.manifest.engines["model"].bytes
    assert {slot for _, slot in expected} >= {
        "weight",
        "exp_avg",
        "exp_avg_sq",
        "buffer",
        "frozen",
        "ema/0.9",
        "ema/0.99",
    }
    for step in range(2, saves + 1):
        checkpoint = Checkpoint(folder / f"step_{step:09d}")
        found = whole(checkpoint)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), checkpoint.folder
        assert checkpoint.source("model").scalars == first.source("model").scalars
    for ranks in legs:
        for turns in zip(*ranks, strict=True):
            assert sum(turn["read"] for turn in turns) == size
            assert all(turn["scalars"] == turns[0]["scalars"] for turn in turns)


def test_every_engine_takes_over_from_every_other_bit_for_bit(tmp_path):
    start(tmp_path, steps=4)
    configs = [zero(3), zero(1), eager(), zero(2, offload_optimizer=True), zero(3, sharded_init=True), zero(0), zero(3)]
    ranks = run_ranks(leg, 2, tmp_path, configs, 1, 0)
    assert_pure_chain(tmp_path, [ranks], 1 + len(configs))


def test_training_goes_on_as_if_nothing_had_happened(tmp_path):
    """Eager alone, then ZeRO-3 on two ranks, then ZeRO-2 alone: the eager engine's losses and weights."""
    losses, state = oracle(12)
    start(tmp_path, steps=4)
    middle = run_ranks(leg, 2, tmp_path, [zero(3)], 1, 4)[0][0]["losses"]
    last = run_ranks(leg, 1, tmp_path, [zero(2)], 2, 4)[0][0]["losses"]
    assert losses[-1] < 0.9 * losses[0]
    assert_follows([middle, last], losses[4:12])
    assert_near(whole(Checkpoint(tmp_path / "step_000000003")), state)


def assert_follows(parts: list[list[float]], expected: list[float]) -> None:
    """The design page's tolerances: 1e-6 on the first step after a change, 1e-5 later."""
    assert parts[0][0] == pytest.approx(expected[0], rel=1e-6)
    assert [loss for part in parts for loss in part] == pytest.approx(expected, rel=1e-5)


def assert_near(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=str(key))


WORLDS: list[tuple[int, EngineConfig]] = [(2, zero(3)), (4, zero(1)), (3, zero(3)), (1, eager())]


@pytest.mark.long
@pytest.mark.parametrize("steps", [0, 4])
def test_one_two_four_three_one_ranks(tmp_path, steps):
    losses, state = oracle(4 + 4 * len(WORLDS))
    start(tmp_path, steps=4)
    legs = [
        run_ranks(leg, world, tmp_path, [config], number + 1, steps) for number, (world, config) in enumerate(WORLDS)
    ]
    if steps == 0:
        assert_pure_chain(tmp_path, legs, 1 + len(WORLDS))
        return
    assert_follows([ranks[0][0]["losses"] for ranks in legs], losses[4:])
    assert_near(whole(Checkpoint(tmp_path / f"step_{1 + len(WORLDS):09d}")), state)


def warmed(comm: Comm, folder: Path) -> list[dict]:
    """Warm starts of divided engines from one checkpoint; their states as saved anew."""
    seen = []
    for number, config in enumerate([zero(3), zero(1)]):
        engine = build(comm, config, seed=7)
        fresh = snapshot(engine, comm).whole()
        done = warm_start(engine, folder, comm, exclude=["norms.1.*"], weights="ema/0.9")
        seen.append({"done": done, "fresh": fresh, "state": snapshot(engine, comm).whole(), "number": number})
    return seen


def test_a_warm_start_fills_divided_engines_with_weights_only(tmp_path):
    start(tmp_path, steps=4)
    stored = whole(Checkpoint(tmp_path / "step_000000001"))
    for seen in run_ranks(warmed, 2, tmp_path)[0]:
        assert seen["done"].fresh == ("norms.1.weight", "norms.1.bias")
        for (name, slot), value in seen["state"].items():
            if name.startswith("norms.1.") or slot.startswith("exp_avg"):
                expected = seen["fresh"][name, slot]
            else:
                expected = stored[name, "ema/0.9" if slot in ("weight", "ema/0.9", "ema/0.99") else slot]
            assert torch.equal(value.flatten(), expected.flatten()), (name, slot)
