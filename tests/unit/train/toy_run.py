"""A task with two engines for the tests of the loop: an auto-encoder with dropout, and a critic that learns from it.

Run as a program, it trains in a folder and is killed after a step: `python toy_run.py FOLDER STEP`.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokscale.base import rng
from tokscale.base.batch import Batch, LossOutput, StepResult
from tokscale.base.errors import DataError
from tokscale.base.protocols import Engine
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.store import CheckpointStore
from tokscale.dist.comm import Comm
from tokscale.dist.env import detect
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig, ZeroConfig
from tokscale.train.hooks import Hook
from tokscale.train.loop import LoopConfig, Trainer, TrainResult

GLOBAL_BATCH = 4
EAGER = EagerConfig()


class Points(Batch):
    """Nothing but positions: the data are a function of them."""

    def data(self) -> torch.Tensor:
        places = self.positions[:, None] + torch.arange(6)
        return torch.sin(places.float())


class Loader:
    """Global batch t is the positions `[t * GLOBAL_BATCH, (t + 1) * GLOBAL_BATCH)`; each rank takes its slice."""

    def __init__(self, comm: Comm, poisoned: Sequence[int] = (), pause: float = 0.0, torn: int | None = None):
        self.comm, self.poisoned, self.pause, self.at = comm, set(poisoned), pause, 0
        self.torn = torn if comm.rank == comm.world - 1 else None

    def next_batch(self) -> Points:
        time.sleep(self.pause)
        if self.at == self.torn:
            raise DataError("shard 7 is torn")
        share = GLOBAL_BATCH // self.comm.world
        start = self.at * GLOBAL_BATCH + self.comm.rank * share
        poison = -(10**9) if self.at in self.poisoned and self.comm.is_main else 0
        self.at += 1
        return Points(positions=torch.arange(start, start + share) + poison)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.at = state["at"]


class Coder(nn.Module):
    """Reconstructs through a bottleneck; a poisoned batch gives a loss that is not finite."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.1), nn.Linear(3, 6))

    def forward(self, batch: Points) -> LossOutput:
        data = batch.data()
        data = data / (batch.positions > -(10**8))[:, None]
        error = (self.net(data) - data).square().mean()
        return LossOutput(total=error, parts={"error": error})

    def train_flops(self) -> float:
        return 100.0

    def anneal(self, step: int) -> None:
        self.annealed = step


class Critic(Coder):
    """Another set of weights with another learning rate."""


class TwoEngines:
    """Coder and critic learn in turn; the task has state of its own."""

    def __init__(self, comm: Comm, total: int, config: EagerConfig | ZeroConfig):
        def build(name: str, kind: type[Coder], lr: float):
            def make() -> Coder:
                with rng.scope(0, "init", name):
                    return kind()

            return build_engine(
                name,
                make,
                config=config,
                optimizer=AdamWConfig(lr=lr),
                schedule=ScheduleConfig(),
                comm=comm,
                micro_batches=1,
                micro_batch_size=GLOBAL_BATCH // comm.world,
                total_steps=total,
            )

        self.engines: Mapping[str, Engine] = {
            "coder": build("coder", Coder, 0.02),
            "critic": build("critic", Critic, 0.01),
        }
        self.seen = 0

    def step(self, batch: Points, step: int) -> StepResult:
        metrics, reports = {}, {}
        for name, engine in self.engines.items():
            output = engine(batch)
            engine.backward(output.total)
            reports[name] = engine.step(step)
            metrics[f"loss/{name}"] = output.total.item()
        self.seen += 1
        return StepResult(metrics={"loss": sum(metrics.values()), **metrics}, reports=reports)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]


def trainer(
    comm: Comm,
    folder: Path,
    *,
    total: int = 12,
    every: int = 5,
    poisoned: Sequence[int] = (),
    pause: float = 0.0,
    torn: int | None = None,
    hooks: Sequence[Hook] = (),
    engine: EagerConfig | ZeroConfig = EAGER,
    **options: Any,
) -> Trainer:
    return Trainer(
        TwoEngines(comm, total, engine),
        Loader(comm, poisoned, pause, torn),
        config=LoopConfig(total_steps=total, log_every=1, **options),
        store=CheckpointStore(folder / "checkpoints", CheckpointConfig(every_steps=every), comm),
        comm=comm,
        run_dir=folder,
        hooks=hooks,
        seed=7,
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything the engines would save."""
    return {
        f"{name}/{shard.name}/{shard.slot}": shard.data.clone()
        for name, engine in trainer.task.engines.items()
        for shard in engine.shards()
    }


def run(comm: Comm, folder: Path, **options: Any) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    made = trainer(comm, folder, **options)
    return made.run(), weights(made)


class Killed(Hook):
    """The process is, after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run(Comm(detect()), Path(sys.argv[1]), hooks=[Killed(int(sys.argv[2]))])
