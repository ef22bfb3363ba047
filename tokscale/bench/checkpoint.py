"""`bench checkpoint`: what a save costs training, what another world size costs a load, and an export beside a copy.

The rounds of each comparison are interleaved, and medians compared, so that a machine that slows down or speeds up does
so for both sides.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from tokscale.base import rng
from tokscale.base.batch import TokenBatch
from tokscale.base.config import Config, PathKey, encode
from tokscale.base.files import sha256_file
from tokscale.base.protocols import Engine
from tokscale.bench.measure import row
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.export import export_checkpoint
from tokscale.checkpoint.reader import Checkpoint
from tokscale.checkpoint.store import CheckpointStore
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.native import save_native
from tokscale.models.dalle import DALLEConfig
from tokscale.models.registry import build_model


class CheckpointBench(Config):
    """What `bench checkpoint` measures with."""

    dim: int = Field(default=512, ge=16)
    """Width of the DALL-E whose state is saved."""
    depth: int = Field(default=6, ge=1)
    """Its layers; the default has about 30 million parameters, 350 MB of weights and moments."""
    world: int = Field(default=2, ge=1)
    """Ranks that save, with ZeRO-3."""
    other_world: int = Field(default=3, ge=1)
    """Ranks that load it."""
    rounds: int = Field(default=5, ge=1)
    """Measurements of each side."""
    folder: PathKey | None = None
    """Where to write; by default the system's temporary folder."""


CONFIG = CheckpointBench


def rows(config: CheckpointBench) -> list[dict[str, Any]]:
    """Measure, and return the rows of the report."""
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        folder = Path(name)
        saves = run_ranks(_saving, config.world, config, folder, timeout=1800)
        same, other = _loads(config, folder)
        resumes = run_ranks(_resuming, config.world, config, folder, timeout=1800)
        exported, copied, hashed = _exporting(config, folder)
    size = f"{saves[0]['parameters'] / 1e6:.0f}M"
    zero = f"{size}/fp32/zero3-{config.world}"
    # Every rank waits for the slowest.
    stall, native, sync, step, beside = (
        max(rank[key] for rank in saves) for key in ("stall", "native", "sync", "step", "step beside a save")
    )
    return [
        row(f"checkpoint/async/{zero}/vs-deepspeed/time", stall, native, "s", 10.0),
        row(f"checkpoint/sync/{zero}/vs-deepspeed/time", sync, native, "s"),
        row(f"checkpoint/step-beside-a-save/{zero}/vs-step/time", beside, step, "s"),
        row(
            f"checkpoint/load-{config.other_world}-ranks/{zero}/vs-{config.world}-ranks/time", other, same, "s", 1 / 1.5
        ),
        row(
            f"checkpoint/resume-verify-read/{zero}/vs-verify-sizes/time",
            max(rank["read"] for rank in resumes),
            max(rank["sizes"] for rank in resumes),
            "s",
            1 / 1.05,
        ),
        row(f"checkpoint/export/{size}/fp32/vs-copy/time", exported, copied, "s", 0.7),
        row(f"checkpoint/export-sha256-alone/{size}/fp32/vs-copy/time", hashed, copied, "s"),
    ]


@contextmanager
def _timed(into: list[float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    into.append(time.perf_counter() - began)


def _model_config(config: CheckpointBench) -> DALLEConfig:
    return DALLEConfig(
        dim=config.dim,
        depth=config.depth,
        num_text_tokens=4096,
        num_image_tokens=8192,
        image_grid=(4, 4),
        text_seq_len=16,
    )


def _engine(config: CheckpointBench, comm: Comm) -> Engine:
    def make() -> nn.Module:
        with rng.scope(0, "bench", "checkpoint"):
            return build_model(_model_config(config))

    return build_engine(
        "model",
        make,
        config=ZeroConfig(stage=3),
        optimizer=AdamWConfig(),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=1,
        total_steps=1_000_000,
    )


def _step(engine: Engine, step: int) -> None:
    ones = torch.ones(1, 16, dtype=torch.int64)
    batch = TokenBatch(positions=ones[:, 0], text=ones, text_mask=ones.bool(), codes=ones.reshape(1, 4, 4))
    engine.backward(engine(batch.to(engine.device)).total)
    engine.step(step)


def _saving(comm: Comm, config: CheckpointBench, folder: Path) -> dict[str, float]:
    """On each rank: medians of the stall of an asynchronous save, of the synchronous ones, and of steps beside them."""
    engine = _engine(config, comm)
    beside = CheckpointStore(folder / "beside", CheckpointConfig(async_save=True, keep_last=2), comm)
    inside = CheckpointStore(folder / "checkpoints", CheckpointConfig(keep_last=2), comm)
    times: dict[str, list[float]] = {key: [] for key in ("stall", "native", "sync", "step", "step beside a save")}
    step = 0
    # The first round, in which memory is touched for the first time, is not counted.
    for number in range(config.rounds + 1):
        for _ in range(3):
            with _timed(times["step"]):
                _step(engine, step)
            step += 1
        with _timed(times["stall"]):
            beside.save(step, {"model": engine}, {})
        while True:
            with _timed(times["step beside a save"]):
                _step(engine, step)
            step += 1
            if beside.poll() is not None:
                break
        comm.barrier()
        with _timed(times["native"]):
            save_native(engine, folder / "native", "tag")
        comm.barrier()
        with _timed(times["sync"]):
            inside.save(step, {"model": engine}, {})
        comm.barrier()
        if number == 0:
            for values in times.values():
                values.clear()
    parameters = sum(parameter.numel() for parameter in _meta_model(config).parameters())
    return {key: median(values) for key, values in times.items()} | {"parameters": parameters}


def _loading(comm: Comm, config: CheckpointBench, folder: Path) -> dict[str, float]:
    """On each rank: the median time of a load, of which the first, from a cold cache, is not counted."""
    engine = _engine(config, comm)
    store = CheckpointStore(folder / "checkpoints", CheckpointConfig(), comm)
    times: list[float] = []
    for _ in range(config.rounds + 1):
        found = store.newest()
        assert found is not None
        comm.barrier()
        with _timed(times), found.source("model") as source:
            engine.load(source)
    return {"load": median(times[1:])}


def _resuming(comm: Comm, config: CheckpointBench, folder: Path) -> dict[str, float]:
    """On each rank: medians of a whole resume (the engine made, its state read), hashed on the way or not."""
    times: dict[Literal["read", "sizes"], list[float]] = {"read": [], "sizes": []}
    for _ in range(config.rounds + 1):
        for verify, found in times.items():
            store = CheckpointStore(folder / "checkpoints", CheckpointConfig(verify=verify), comm)
            comm.barrier()
            with _timed(found):
                engine = _engine(config, comm)

                def load(checkpoint: Checkpoint, engine: Engine = engine) -> None:
                    with checkpoint.source("model") as source:
                        engine.load(source)

                store.resume({"model": engine}, load)
    return {verify: median(found[1:]) for verify, found in times.items()}


def _loads(config: CheckpointBench, folder: Path) -> tuple[float, float]:
    """Medians of a load on as many ranks as saved, and on other ones; each waits for its slowest rank."""
    times: dict[int, list[float]] = {config.world: [], config.other_world: []}
    for _ in range(min(2, config.rounds)):
        for world, found in times.items():
            found.append(max(rank["load"] for rank in run_ranks(_loading, world, config, folder)))
    return median(times[config.world]), median(times[config.other_world])


def _meta_model(config: CheckpointBench) -> nn.Module:
    with torch.device("meta"):
        return build_model(_model_config(config))


def _exporting(config: CheckpointBench, folder: Path) -> tuple[float, float, float]:
    """Medians of an export, of a durable copy of what it wrote, and of the sha256 of that, which an export contains."""
    exports: list[float] = []
    copies: list[float] = []
    hashes: list[float] = []
    checkpoint = Checkpoint(sorted((folder / "checkpoints").glob("step_*"))[-1])
    meta, out = _meta_model(config), folder / "export"
    for _ in range(config.rounds + 1):
        shutil.rmtree(out, ignore_errors=True)
        with _timed(exports):
            export_checkpoint(checkpoint, "model", meta_model=meta, model_config=encode(_model_config(config)), out=out)
        with _timed(copies):
            _durable_copy(out / "model.safetensors", folder / "copy")
        with _timed(hashes):
            sha256_file(folder / "copy")
        (folder / "copy").unlink()
    return median(exports[1:]), median(copies[1:]), median(hashes[1:])


def _durable_copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
