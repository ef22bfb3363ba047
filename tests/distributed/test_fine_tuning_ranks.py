"""Frozen parts, learning rates by pattern and resized tables: every engine on two ranks does what one process does."""

from pathlib import Path

import torch

from tokscale.base.rows import Rows
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.resizing import Resizing
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.testing import alone
from tokscale.checkpoint.warmstart import warm_start
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, EngineConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.testing import snapshot, toy, train

SCALES = {"embed.*": 0.1, "*.bias": 2.0}
CONFIGS: dict[str, EngineConfig] = {"eager": EagerConfig()} | {
    f"zero{stage}": ZeroConfig(stage=stage, param_persistence_threshold=0, reduce_bucket_size=200) for stage in range(4)
}


def build(comm: Comm, config: EngineConfig, seed: int):
    made = toy(seed)

    def some_frozen() -> torch.nn.Module:
        model = made()
        model.norms[0].requires_grad_(False)
        return model

    return build_engine(
        "model",
        some_frozen,
        config=config,
        optimizer=AdamWConfig(lr=0.02, lr_scales=SCALES),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=8 // comm.world,
        total_steps=10,
    )


def tuned(comm: Comm, config: EngineConfig, folder: Path) -> dict:
    engine = build(comm, config, seed=7)
    rows = {"embed.weight": (Rows("words", tuple(whole_rows(engine, comm))),)}
    count = rows["embed.weight"][0].count
    numbers = [count - 1 - number if number % 3 else -1 for number in range(count)]
    done = warm_start(engine, folder, comm, resizing=Resizing(rows, rows, {"words": numbers}))
    began = snapshot(engine, comm).whole()
    train(engine, comm, range(3))
    return {"done": done, "began": began, "ended": snapshot(engine, comm).whole()}


def whole_rows(engine, comm: Comm) -> tuple[int]:
    return (snapshot(engine, comm).whole()["embed.weight", "weight"].shape[0],)


def ranks(comm: Comm, folder: Path) -> dict[str, dict]:
    return {name: tuned(comm, config, folder) for name, config in CONFIGS.items()}


def test_every_engine_fine_tunes_alike(tmp_path):
    stored = build(alone(), EagerConfig(), seed=1)
    CheckpointStore(tmp_path, CheckpointConfig(), alone()).save(0, {"model": stored}, {})
    wanted = tuned(alone(), EagerConfig(), tmp_path)
    fresh = snapshot(build(alone(), EagerConfig(), seed=7), alone()).whole()
    before = snapshot(stored, alone()).whole()
    table = wanted["began"]["embed.weight", "weight"]
    for number in range(len(table)):
        known, at = (before, len(table) - 1 - number) if number % 3 else (fresh, number)
        source = known["embed.weight", "weight"][at]
        assert torch.equal(table[number], source)
    for name, seen in run_ranks(ranks, 2, tmp_path)[0].items():
        assert "embed.weight" in seen["done"].resized
        for key, value in wanted["began"].items():
            assert torch.equal(seen["began"][key].flatten(), value.flatten()), (name, key)
        for key, value in wanted["ended"].items():
            torch.testing.assert_close(
                seen["ended"][key].flatten(), value.flatten(), rtol=1e-4, atol=1e-6, msg=f"{name} {key}"
            )
    moved = (wanted["ended"]["embed.weight", "weight"] - table).abs().max()
    assert 0 < moved < 0.1 * 0.02 * 3 * 1.1, "three steps at a tenth of the learning rate"
    frozen = [key for key in wanted["began"] if key[1] == "frozen"]
    assert frozen and all(torch.equal(wanted["began"][key], wanted["ended"][key]) for key in frozen)
