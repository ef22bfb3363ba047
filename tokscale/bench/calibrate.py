"""`bench calibrate`: whether `bench plan`'s time model keeps its word here: one run is measured, others are predicted.

    tokscale bench calibrate sizes=[64,96,128] worlds=[1,2] out=calibrate.json

A small DALL-E trains under ZeRO-3 on processes of this machine. From its first size, on one process and on two, follow
the rates of products, of an update and of the link, which then predict the steps of the other sizes; `ours` is the
prediction, `baseline` what was measured. Nothing else should run on the machine.
"""

import math
import statistics
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import Field, PositiveInt

from tokscale.base import rng
from tokscale.base.batch import TokenBatch
from tokscale.base.config import Config
from tokscale.bench.measure import row
from tokscale.bench.plan_time import Choice, StepTime, TimeConfig, Work, step_time
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, ScheduleConfig, ZeroConfig
from tokscale.models.dalle import DALLEConfig
from tokscale.models.registry import build_model

_GRID, _TEXT = (8, 8), 16
_SLOW = 1e30
"""Bytes a second of what is folded into another rate."""


class CalibrateBench(Config):
    """What `bench calibrate` is asked."""

    sizes: tuple[PositiveInt, ...] = (128, 192, 256)
    """Widths of the model; the first is the one that is calibrated on."""
    worlds: tuple[PositiveInt, ...] = (1, 2)
    """Numbers of processes; the link is calibrated on the first above one."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Samples on each process."""
    steps: int = Field(default=12, ge=3)
    """That are measured; the median counts."""


CONFIG = CalibrateBench


def rows(config: CalibrateBench) -> Iterator[dict[str, Any]]:
    """Measure all, fit on the first size, and predict."""
    measured = {
        (world, size): run_ranks(seconds, world, size, config, fork=True, imports=("deepspeed",), timeout=3600.0)[0]
        for world in config.worlds
        for size in config.sizes
    }
    first = config.sizes[0]
    fitted = calibrated(config, {world: measured[world, first] for world in config.worlds})
    for (world, size), (step, update) in measured.items():
        predicted = predict(config, fitted[world], world, size)
        name = f"calibrate/dalle-{size}/{world}-ranks/fp32"
        yield row(f"{name}/step", predicted.seconds, step, "s", None)
        yield row(f"{name}/update", max(predicted.optimizer, 1e-9), update, "s", None)


def calibrated(config: CalibrateBench, measured: dict[int, tuple[float, float]]) -> dict[int, TimeConfig]:
    """Rates by number of processes: those that share a machine's cores compute more slowly, and are linked by memory.

    Args:
        config: Whose first size was measured.
        measured: Seconds of a step and of an update by number of processes.
    """
    work, alone = work_of(config.sizes[0]), min(measured)
    found = {}
    for world, (step, update) in measured.items():
        share = work.parameters / world
        memory = share * work.update_bytes / update
        compute = step - update
        link = _SLOW
        if world > 1:
            # What a step takes longer than the same products alone is the link's, as long as there are cores for all.
            compute = min(measured[alone][0] - measured[alone][1], compute)
            moved = 12 * work.parameters * (world - 1) / world
            link = moved / max(step - update - compute, 1e-9)
        rate = config.micro_batch_size * work.flops / compute
        found[world] = TimeConfig(
            peak_flops=rate, efficiency=1.0, memory_bandwidth=memory, node_bandwidth=link, link_bandwidth=link
        )
    return found


def predict(config: CalibrateBench, rates: TimeConfig, world: int, size: int) -> StepTime:
    """A step of another size. Gloo moves in the processes that compute, so nothing hides: both are exposed."""
    work = work_of(size)
    time_ = step_time(work, Choice(world, config.micro_batch_size), rates, dtype="fp32", gpus_per_node=world)
    moved = 12 * work.parameters * (world - 1) / world / rates.node_bandwidth
    return StepTime(time_.compute, moved * 2 / 3, moved / 3, time_.optimizer, 0.0, 0.0, time_.tokens, time_.mfu)


def model_of(size: int) -> Any:
    """The model's configuration."""
    image: Any = SimpleNamespace(num_tokens=256, code_shape=_GRID, image_size=64, channels=3)
    model: Any = DALLEConfig(dim=size, depth=4, heads=4, dim_head=size // 4, text_seq_len=_TEXT, attn_types=("full",))
    return model.fitted(image, SimpleNamespace(num_tokens=256))


def work_of(size: int) -> Work:
    """Of a step; what autograd keeps is folded into the rate of products."""
    with torch.device("meta"):
        model: Any = build_model(model_of(size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Work(parameters, model.train_flops(), 0.0, _TEXT + math.prod(_GRID), 0, update_bytes=28.0)


def seconds(comm: Comm, size: int, config: CalibrateBench) -> tuple[float, float]:
    """Median seconds of a step, and of the update in it."""
    engine = build_engine(
        "model",
        lambda: build_model(model_of(size)),
        config=ZeroConfig(stage=3, param_persistence_threshold=0),
        optimizer=AdamWConfig(lr=1e-3),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=config.micro_batch_size,
        total_steps=config.steps + 3,
    )
    draw = rng.generator(0, "calibrate", comm.rank)
    text = torch.randint(1, 256, (config.micro_batch_size, _TEXT), generator=draw)
    codes = torch.randint(0, 256, (config.micro_batch_size, *_GRID), generator=draw)
    batch = TokenBatch(positions=torch.arange(len(text)), text=text, text_mask=text > 0, codes=codes)
    taken, updates = [], []
    for step in range(config.steps + 3):
        comm.barrier()
        began = time.perf_counter()
        engine.backward(engine(batch).total)
        middle = time.perf_counter()
        engine.step(step)
        now = time.perf_counter()
        taken.append(now - began)
        updates.append(now - middle)
    return statistics.median(taken[3:]), statistics.median(updates[3:])
