"""`bench calibrate`: whether `bench plan`'s time model keeps its word here: one run is measured, others are predicted.

    tokscale bench calibrate sizes=[128,192,256] worlds=[1,2] out=calibrate.json

A small DALL-E trains under ZeRO-3 on processes of this machine. Its first size, one so narrow that it hardly computes,
and a large product give the rates of each class of kernel, of an update and of the link; they then predict the steps of
the other sizes. `ours` is the prediction, `baseline` what was measured, and the target is to be within 15 % where each
process has a core. Nothing else should run on the machine.
"""

import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import Field, PositiveInt

from tokscale.base import rng
from tokscale.base.batch import TokenBatch
from tokscale.base.config import Config
from tokscale.bench.measure import row
from tokscale.bench.memory import step_peak
from tokscale.bench.plan_time import Choice, StepTime, TimeConfig, Work, step_time
from tokscale.bench.train import peak_here
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, ScheduleConfig, ZeroConfig
from tokscale.models.dalle import DALLEConfig
from tokscale.models.registry import build_model

_GRID, _TEXT = (8, 8), 16
_NARROW = 32
"""Width of the model that hardly computes."""
_PASSES = 5
"""How often `step_time` has what autograd keeps move through memory, without recomputation."""
_SLOW = 1e30
"""Bytes a second of what takes no time."""
_TARGET = 1 / 1.15
"""The smaller of prediction and measured step over the larger."""


class CalibrateBench(Config):
    """What `bench calibrate` is asked."""

    sizes: tuple[PositiveInt, ...] = (128, 192, 256)
    """Widths of the model; the first is the one that is calibrated on."""
    worlds: tuple[PositiveInt, ...] = (1, 2)
    """Numbers of processes; the link is calibrated on the first above one."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Samples on each process."""
    steps: int = Field(default=30, ge=3)
    """That are measured; the median counts."""


CONFIG = CalibrateBench


@dataclass(frozen=True)
class Timed:
    """What one run took."""

    step: float
    """Median seconds."""
    update: float
    """Median seconds, which are part of the step's."""
    peak: float
    """Operations a second of a large product, while all processes compute one."""


@dataclass(frozen=True)
class Rates:
    """What a calibration says of a number of processes."""

    time: TimeConfig
    host: float = 0.0
    """Seconds of a step at no size: hooks and calls. A GPU's host runs ahead; here both are the same processor."""
    messages: float = 0.0
    """Seconds of communication at no size."""
    update: float = 0.0
    """Seconds of an update at no size."""
    update_bandwidth: float = _SLOW
    """Bytes a second that an update reads and writes; it is not what layers reach, whose tensors fit the cache."""


def rows(config: CalibrateBench) -> Iterator[dict[str, Any]]:
    """Measure all, fit on the first size, and predict."""
    measured = {
        (world, size): run_ranks(timed, world, size, config, fork=True, imports=("deepspeed",), timeout=3600.0)[0]
        for world in config.worlds
        for size in (_NARROW, *config.sizes)
    }
    fitted = calibrated(config, measured)
    for (world, size), found in measured.items():
        if size == _NARROW:
            continue
        predicted = predict(config, fitted[world], world, size)
        name = f"calibrate/dalle-{size}/{world}-ranks/fp32"
        yield row(f"{name}/step", predicted.seconds, found.step, "s", None)
        if size != config.sizes[0]:
            agreement = min(predicted.seconds / found.step, found.step / predicted.seconds)
            target = _TARGET if world <= _cores() else None
            yield row(f"{name}/step/agreement", agreement, 1.0, "of one", target, more_is_better=True)
        yield row(f"{name}/update", max(predicted.optimizer, 1e-9), found.update, "s", None)


def calibrated(config: CalibrateBench, measured: Mapping[tuple[int, int], Timed]) -> dict[int, Rates]:
    """Rates by number of processes: those that share a machine's cores compute more slowly, and are linked by memory.

    Args:
        config: Whose first size was measured.
        measured: By number of processes and width, the first and the narrow one at least.
    """
    sizes, size = (_NARROW, config.sizes[0]), config.micro_batch_size
    works = [work_of(width) for width in sizes]
    alone = [measured[min(config.worlds), width] for width in sizes]
    others = [a.step - a.update - size * w.flops / alone[1].peak for a, w in zip(alone, works, strict=True)]
    host, kept_seconds = _line([work.kept for work in works], others)
    found = {}
    for world in config.worlds:
        here = [measured[world, width] for width in sizes]
        slower = alone[1].peak / here[1].peak if world > _cores() else 1.0
        computing = [(host + kept_seconds * w.kept) * slower + size * w.flops / here[1].peak for w in works]
        update, update_seconds = _line(
            [work.parameters * work.update_bytes / world for work in works], [run.update for run in here]
        )
        messages, link_seconds = 0.0, 1 / _SLOW
        if world > 1:
            waited = [run.step - run.update - seconds for run, seconds in zip(here, computing, strict=True)]
            messages, link_seconds = _line([_moved(work, world) for work in works], waited)
        rates = TimeConfig(
            peak_flops=here[1].peak,
            efficiency=1.0,
            memory_bandwidth=_PASSES * size / max(kept_seconds * slower, 1 / _SLOW),
            node_bandwidth=1 / link_seconds,
            link_bandwidth=1 / link_seconds,
        )
        found[world] = Rates(rates, host * slower, messages, update, 1 / update_seconds)
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _line(amounts: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds at nothing, and for each further one, of a line through two points; neither is below zero."""
    slope = max((seconds[1] - seconds[0]) / (amounts[1] - amounts[0]), 1 / _SLOW)
    return max(seconds[1] - slope * amounts[1], 0.0), slope


def _moved(work: Work, world: int) -> float:
    """Bytes that a rank receives and sends in a step: two gatherings and one reduction, in fp32."""
    return 12 * work.parameters * (world - 1) / world


def predict(config: CalibrateBench, rates: Rates, world: int, size: int) -> StepTime:
    """A step of another size. Gloo moves in the processes that compute, so nothing hides: both are exposed."""
    work = work_of(size)
    time_ = step_time(work, Choice(world, config.micro_batch_size), rates.time, dtype="fp32", gpus_per_node=world)
    waits = rates.messages + _moved(work, world) / rates.time.node_bandwidth if world > 1 else 0.0
    update = rates.update + work.parameters * work.update_bytes / world / rates.update_bandwidth
    return replace(
        time_,
        compute=time_.compute + rates.host,
        exposed_gather=waits * 2 / 3,
        exposed_reduce=waits / 3,
        optimizer=update,
        save=0.0,
        hidden=0.0,
    )


def model_of(size: int) -> Any:
    """The model's configuration."""
    image: Any = SimpleNamespace(num_tokens=256, code_shape=_GRID, image_size=64, channels=3)
    model: Any = DALLEConfig(dim=size, depth=4, heads=4, dim_head=size // 4, text_seq_len=_TEXT, attn_types=("full",))
    return model.fitted(image, SimpleNamespace(num_tokens=256))


@cache
def work_of(size: int) -> Work:
    """Of a step."""
    with torch.device("meta"):
        model: Any = build_model(model_of(size))
        one, two = (step_peak(model, _batch(count, torch.device("meta"))).forward for count in (1, 2))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = _TEXT + math.prod(_GRID)
    return Work(parameters, model.train_flops(), two - one, tokens, layers=0, update_bytes=28.0)


def _batch(count: int, device: torch.device, draw: torch.Generator | None = None) -> TokenBatch:
    text = torch.randint(1, 256, (count, _TEXT), generator=draw, device=device)
    codes = torch.randint(0, 256, (count, *_GRID), generator=draw, device=device)
    return TokenBatch(positions=torch.arange(count, device=device), text=text, text_mask=text > 0, codes=codes)


def timed(comm: Comm, size: int, config: CalibrateBench) -> Timed:
    """What a step takes on each process, as the first sees it."""
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
    batch = _batch(config.micro_batch_size, torch.device("cpu"), rng.generator(0, "calibrate", comm.rank))
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
    comm.barrier()
    peak = peak_here(torch.device("cpu"), "fp32")
    return Timed(statistics.median(taken[3:]), statistics.median(updates[3:]), peak)
