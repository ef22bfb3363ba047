"""A few steps under torch's profiler, as a trace for chrome://tracing or Perfetto."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch.profiler import ProfilerActivity, profile

from tokscale.base.config import Config
from tokscale.base.files import storage_errors
from tokscale.base.log import logger
from tokscale.dist.comm import Comm
from tokscale.train.hooks import Hook
from tokscale.train.metrics import MetricsWriter

FOLDER = "profile"
log = logger("train")


class ProfileConfig(Config):
    """Which steps to profile."""

    steps: int = Field(default=0, ge=0)
    """So many steps; 0 profiles none."""
    skip: int = Field(default=10, ge=1)
    """Steps of this process before them, since the first ones compile and allocate."""
    memory: bool = False
    """Record allocations, too."""


class Profile(Hook):
    """Writes `profile/rank_0000.json` and a table of what took longest, `profile/rank_0000.txt`."""

    def __init__(self, config: ProfileConfig, comm: Comm, run_dir: Path):
        """Profile every rank; waits for the device before and after."""
        self._config, self._comm, self._folder = config, comm, run_dir / FOLDER
        self._first = 0
        self._profiler: Any = None

    def on_begin(self, step: int, writer: MetricsWriter | None) -> None:
        """Count from here."""
        del writer
        self._first = step + self._config.skip

    def due(self, step: int) -> bool:
        """At both ends, so that exactly the steps between them are seen."""
        return step in (self._first, self._first + self._config.steps)

    def on_step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Begin, or end and write."""
        del metrics
        if step == self._first:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._comm.device.type == "cuda")
            self._profiler = profile(activities=activities, profile_memory=self._config.memory)
            self._profiler.start()
        elif step == self._first + self._config.steps:
            self._finish()

    def on_end(self, step: int) -> None:
        """Write what there is when the run ended before."""
        del step
        self._finish()

    def _finish(self) -> None:
        if self._profiler is None:
            return
        if self._comm.device.type == "cuda":
            torch.cuda.synchronize(self._comm.device)
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        trace = self._folder / f"rank_{self._comm.rank:04d}.json"
        with storage_errors(trace):
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            key = "self_cuda_time_total" if self._comm.device.type == "cuda" else "self_cpu_time_total"
            trace.with_suffix(".txt").write_text(profiler.key_averages().table(sort_by=key, row_limit=40))
        if self._comm.is_main:
            log.info("profiled steps are in %s; open it in chrome://tracing or Perfetto", trace)
