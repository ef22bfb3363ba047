"""Two ZeRO-3 ranks, one of them killed somewhere in a save: the restart ends with the undisturbed run's bits."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.reader import Checkpoint
from tokscale.checkpoint.status import describe
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.testing import FaultyDisk
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.testing import toy, train

TOTAL = 6
FIRST_ROUND = 20_000
"""Seed of the first round; no test depends on the day it runs."""


def training(comm: Comm, folder: Path, victim: int, fault: str, at: int, background: bool) -> tuple[int, int]:
    """Train to the end with a save every second step; the step resumed from, and the file layer's calls."""
    engine = build_engine(
        "model",
        toy(),
        config=ZeroConfig(stage=3, ema=(0.9,), param_persistence_threshold=0),
        optimizer=AdamWConfig(lr=0.05),
        schedule=ScheduleConfig(kind="linear"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=4 // comm.world,
        total_steps=TOTAL,
    )
    disk = FaultyDisk(fault, at) if comm.rank == victim else FaultyDisk()
    config = CheckpointConfig(every_steps=2, keep_last=2, async_save=background, verify="full")
    with CheckpointStore(folder, config, comm, disk) as store:
        found = store.newest()
        if found is not None:
            engine.load(found.source("model"))
        first = 0 if found is None else found.state["next"]
        for step in range(first, TOTAL):
            train(engine, comm, [step], batch=4)
            store.poll()
            if store.due(step + 1):
                store.save(step + 1, {"model": engine}, {"next": step + 1})
    return first, disk.count


def contents(folder: Path) -> dict[tuple[str, str], bytes]:
    """The last checkpoint, byte for byte."""
    with Checkpoint(folder / f"step_{TOTAL:09d}").source("model") as source:
        return {
            (name, slot): source.read(name, slot, 0, torch.Size(source.shape(name, slot)).numel()).numpy().tobytes()
            for name in source.names()
            for slot in source.slots(name)
        }


def play(folder: Path, seed: int, calls: list[int], expected: dict[tuple[str, str], bytes]) -> dict[str, Any]:
    """One round; its row in the report."""
    draw = random.Random(seed)
    victim, background = draw.randrange(2), draw.random() < 0.5
    fault, at = draw.choice(["kill-before", "kill-after"]), draw.randrange(calls[victim])
    what = {"seed": seed, "async": background, "fault": fault, "rank": victim, "call": at}
    with pytest.raises(RuntimeError, match="failed"):
        run_ranks(training, 2, folder, victim, fault, at, background)
    infos = describe(folder, verify="full")
    assert all(info.hashes_hold for info in infos), what
    resumed = [first for first, _ in run_ranks(training, 2, folder, 0, "none", -1, background)]
    assert resumed == [max((info.step for info in infos), default=0)] * 2, what
    assert contents(folder) == expected, what
    return what | {"resumed": resumed[0], "outcome": "bit-equal"}


def rounds(tmp_path: Path, seeds: range) -> None:
    calls = [count for _, count in run_ranks(training, 2, tmp_path / "undisturbed", 0, "none", -1, False)]
    expected = contents(tmp_path / "undisturbed")
    rows = [play(tmp_path / str(seed), seed, calls, expected) for seed in seeds]
    (tmp_path / "outcomes.json").write_text(json.dumps(rows, indent=1))


def test_a_killed_zero_rank_loses_nothing(tmp_path):
    rounds(tmp_path, range(FIRST_ROUND, FIRST_ROUND + 1))


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_twenty_killed_zero_ranks_lose_nothing(tmp_path):
    rounds(tmp_path, range(1000 * FIRST_ROUND, 1000 * FIRST_ROUND + 20))
