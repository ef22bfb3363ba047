"""What a run measures about itself, and where it is written: `metrics.jsonl`, and the trackers."""

import json
import math
import os
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tokscale.base.batch import Batch, TokenBatch
from tokscale.base.files import atomic_write, read_regular, row_of, storage_errors
from tokscale.base.text import lines_of
from tokscale.train.trackers import TrackerName, Trackers

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends one JSON line a reported step, and the same metrics to the trackers. For the main rank."""

    def __init__(
        self,
        folder: Path,
        first_step: int,
        trackers: Sequence[TrackerName] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ):
        """Continue at `first_step`: what an earlier process wrote about later steps did not survive, and is dropped.

        Args:
            folder: Of the run.
            first_step: Steps done so far.
            trackers: Where people look at the run.
            config: Of the run, for those that show it.

        Raises:
            EnvironmentRefused: When a tracker is not installed.
        """
        self.path = folder / METRICS_FILE
        _drop_from(self.path, first_step)
        with storage_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a")  # noqa: SIM115 - closed by close()
        self.trackers = Trackers(trackers, folder, first_step, config or {})

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Write the metrics known after `step` steps; a value that is not finite is written as null."""
        row = finite(metrics)
        with storage_errors(self.path):
            self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **row}) + "\n")
            self._file.flush()
        self.trackers.metrics(step, {name: value for name, value in row.items() if value is not None})

    def close(self) -> None:
        """Flush and close all."""
        self._file.close()
        self.trackers.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run folder's `metrics.jsonl`, in order of steps; a torn last line is left out."""
    path = folder / METRICS_FILE
    return (
        [row for row in map(_parse, lines_of(read_regular(path).decode(errors="replace"))) if row is not None]
        if path.exists()
        else []
    )


def finite(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The metrics as strict JSON can hold them: what is not finite becomes None."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}


class Meter:
    """Rates over the steps since the last reading, on one rank."""

    def __init__(self, *, world: int, flops_per_sample: float | None, peak_flops: float | None):
        """Count for `world` ranks of `peak_flops` each; MFU is None unless both rates are known."""
        self._world, self._flops, self._peak = world, flops_per_sample, peak_flops
        self._idle: float | None = None
        self._left_out = 0.0
        self._now = time.perf_counter()
        self._restart()

    def count(self, batch: Batch, waited: float, idle: float | None = None, at: float | None = None) -> None:
        """One step was done on `batch`: seconds that the loop waited for it, and that the device idled before it.

        Rates are up to the last counted step: it was queued `at` (of `time.perf_counter`), by default now.
        """
        self._now = time.perf_counter() if at is None else at
        self._steps += 1
        if idle is not None:
            self._idle = (self._idle or 0.0) + idle
        self._samples += len(batch)
        self._waited += waited
        if isinstance(batch, TokenBatch):
            self._tokens += batch.text.numel() + batch.codes.numel()

    def leave_out(self, seconds: float) -> None:
        """Not count so much time of what the next reading is over: it was spent on something else than training."""
        self._left_out += seconds

    def read(self) -> dict[str, float | None]:
        """Rates of the whole job since the last reading; per second of wall clock, waiting for data included."""
        seconds = max(self._now - self._began, 1e-9)
        images = self._samples * self._world / seconds
        mfu = None
        if self._flops is not None and self._peak is not None:
            mfu = images * self._flops / (self._peak * self._world)
        metrics: dict[str, float | None] = {
            "images_per_second": images,
            "tokens_per_second": self._tokens * self._world / seconds if self._tokens else None,
            "seconds_per_step": seconds / max(self._steps, 1),
            "data_wait": self._waited / seconds,
            "mfu": mfu,
        }
        if self._idle is not None:
            metrics["device_idle"] = self._idle / seconds
        self._restart()
        return metrics

    def _restart(self) -> None:
        self._began = self._now + self._left_out
        self._left_out = 0.0
        self._steps = self._samples = self._tokens = 0
        self._waited, self._idle = 0.0, None


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far in bytes: `memory_rss` of the host, `memory_cuda` of a CUDA device.

    The loop reports the sum over ranks; pages that ranks share are counted once for each.
    """
    metrics = {"memory_rss": float(_peak_rss())}
    if device.type == "cuda":
        metrics["memory_cuda"] = float(torch.cuda.max_memory_allocated(device))
    return metrics


def _peak_rss() -> int:
    # getrusage keeps the peak of the process that ours was forked from, so ask the kernel about ours alone.
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _drop_from(path: Path, first_step: int) -> None:
    if not path.exists():
        return
    lines = lines_of(read_regular(path).decode(errors="replace"))
    kept = [line for line in lines if (row := _parse(line)) is not None and row["step"] <= first_step]
    if len(kept) < len(lines) or (lines and not path.read_text(errors="replace").endswith("\n")):
        with atomic_write(path, "w") as file:
            file.writelines(line + "\n" for line in kept)


def _parse(line: str) -> dict[str, Any] | None:
    row = row_of(line, "step")
    return row if row is not None and isinstance(row["step"], int) else None
