"""`bench goodput`: what is left of a run that is killed again and again, and whether it ends where it would have.

    tokscale bench goodput kills=20 out=goodput.json

Two runs of a small model under ZeRO-3, of real processes. One on two ranks is killed at random moments, all ranks at
once, and started again until it ends; its weights must be those of an undisturbed run to the last bit. The other goes
from 2 ranks to 1 and to 3, and must see the same batches.
"""

import hashlib
import json
import math
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from tokscale.base import rng
from tokscale.base.config import Config
from tokscale.base.log import logger
from tokscale.bench.measure import row
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.reader import Checkpoint
from tokscale.checkpoint.store import CheckpointStore
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.testing import ToyBatch, toy, toy_batch
from tokscale.runs.goodput import Goodput, goodput
from tokscale.train.ledger import read_ledger
from tokscale.train.loop import LoopConfig, Trainer
from tokscale.train.task import SingleModelTask

log = logger("bench")
_BATCH = 12
_LEGS = (2, 1, 3)


class GoodputBench(Config):
    """What `bench goodput` is asked."""

    kills: int = Field(default=20, ge=1)
    """How often the run is killed."""
    total_steps: int = Field(default=2000, ge=40)
    """Of each run."""
    every_steps: int = Field(default=5, ge=1)
    """Between saves."""
    seed: int = 0
    """Of the moments."""


CONFIG = GoodputBench


def rows(config: GoodputBench) -> Iterator[dict[str, Any]]:
    """Run. `ours` is of the disturbed run, `baseline` of the undisturbed one."""
    with tempfile.TemporaryDirectory() as root:
        straight, killed, elastic = (Path(root, name) for name in ("straight", "killed", "elastic"))
        _finish(straight, 2, config.total_steps, config)
        quiet = _of(straight)
        kills = _killed(killed, config)
        disturbed = _of(killed)
        log.info("%s", disturbed.words())
        case = f"goodput/{kills}-kills"
        yield row(
            f"{case}/weights-equal",
            float(_weights(killed) == _weights(straight)),
            1.0,
            "equal",
            1.0,
            more_is_better=True,
        )
        yield row(
            f"{case}/useful-steps", disturbed.useful_steps, quiet.useful_steps, "share", 0.95, more_is_better=True
        )
        yield row(f"{case}/goodput", disturbed.share, quiet.share, "share", None, more_is_better=True)
        for name, seconds in disturbed.lost.items():
            yield row(f"{case}/lost-to-{name}", max(seconds, 1e-3), max(quiet.lost[name], 1e-3), "s", None)
        parts = [config.total_steps * part // 3 for part in (1, 2, 3)]
        for world, steps in zip(_LEGS, parts, strict=True):
            _finish(elastic, world, steps, config)
        equal = _batches(elastic) == _batches(straight)
        yield row("goodput/2-1-3-ranks/batches-equal", float(equal), 1.0, "equal", 1.0, more_is_better=True)


def _killed(folder: Path, config: GoodputBench) -> int:
    """Start, kill and start again, then let it end; how often it was killed."""
    kills = 0
    for number in range(config.kills):
        draw = rng.generator(config.seed, "kills", number)
        steps, delay, rank = (torch.rand((), generator=draw).item() for _ in range(3))
        # After so many steps of this start, and a moment later, which is anywhere in a step, a save or between them.
        kill = 1 + int(steps * 1.6 * config.total_steps / (config.kills + 1)), 0.1 * delay, int(rank * 2)
        try:
            run_ranks(
                train, 2, folder, config.total_steps, config, kill, fork=True, imports=("deepspeed",), timeout=3600.0
            )
        except RuntimeError as error:
            if "failed:\n" in str(error) and "Traceback" in str(error):
                raise
            kills += 1
            lines = read_ledger(folder)
            log.info("kill %d, at step %s", number + 1, lines[-1]["last"] if lines else "none")
    _finish(folder, 2, config.total_steps, config)
    return kills


def _finish(folder: Path, world: int, steps: int, config: GoodputBench) -> None:
    run_ranks(train, world, folder, steps, config, timeout=3600.0, fork=True, imports=("deepspeed",))


def train(
    comm: Comm, folder: Path, steps: int, config: GoodputBench, kill: tuple[int, float, int] | None = None
) -> None:
    """One start of the run, on one rank. `kill`: after which step of it, how much later, by which rank."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = build_engine(
        "model",
        toy(0, dim=48),
        config=ZeroConfig(stage=3, param_persistence_threshold=0),
        optimizer=AdamWConfig(lr=1e-3),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=_BATCH // comm.world,
        total_steps=config.total_steps,
    )
    kept = CheckpointConfig(every_steps=config.every_steps, keep_last=2, async_save=False)
    Trainer(
        SingleModelTask(engine),
        _Batches(comm, folder, kill),
        config=LoopConfig(total_steps=steps, log_every=1),
        store=CheckpointStore(folder / "checkpoints", kept, comm),
        comm=comm,
        run_dir=folder,
    ).run()


class _Batches:
    """This rank's rows of global batches that follow from their number; writes down which were seen."""

    def __init__(self, comm: Comm, folder: Path, kill: tuple[int, float, int] | None):
        self._comm, self._at, self._made, self._kill = comm, 0, 0, kill
        self._seen = open(folder / f"batches.{comm.world}.{comm.rank}.jsonl", "a")  # noqa: SIM115 - for the process

    def next_batch(self) -> ToyBatch:
        self._made += 1
        if self._kill is not None and (self._made, self._comm.rank) == self._kill[::2]:
            threading.Timer(self._kill[1], os.killpg, (os.getpgrp(), signal.SIGKILL)).start()  # all ranks at once
        share = _BATCH // self._comm.world
        rows = slice(self._comm.rank * share, (self._comm.rank + 1) * share)
        whole = toy_batch(self._at, _BATCH)
        batch = ToyBatch(positions=whole.positions[rows], ids=whole.ids[rows])
        digest = [hashlib.sha256(line.numpy().tobytes()).hexdigest()[:16] for line in batch.ids]
        self._seen.write(json.dumps([self._at, dict(zip(batch.positions.tolist(), digest, strict=True))]) + "\n")
        self._seen.flush()
        self._at += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"at": self._at}

    def load_state_dict(self, state: Any) -> None:
        self._at = state["at"]


def _batches(folder: Path) -> dict[int, dict[str, str]]:
    """Samples of each global batch by their position, over all ranks and starts."""
    found: dict[int, dict[str, str]] = {}
    for path in folder.glob("batches.*.jsonl"):
        for line in path.read_text().splitlines():
            step, samples = json.loads(line)
            for position, digest in samples.items():
                assert found.setdefault(step, {}).setdefault(position, digest) == digest
    return found


def _weights(folder: Path) -> dict[str, bytes]:
    newest = max((folder / "checkpoints").glob("step_*"))
    with Checkpoint(newest).source("model") as source:
        return {
            f"{name} {slot}": source.read(name, slot, 0, math.prod(source.shape(name, slot))).numpy().tobytes()
            for name in source.names()
            for slot in source.slots(name)
        }


def _of(folder: Path) -> Goodput:
    found = goodput(folder)
    assert found is not None
    return found
