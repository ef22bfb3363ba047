"""Which step was the best so far by some metric: it is saved, retention keeps it, and training may end when none comes.

All of it follows from `metrics.jsonl`, so that a run that resumes knows what it knew.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tokscale.base.config import Config
from tokscale.base.log import logger
from tokscale.checkpoint.retention import write_best
from tokscale.dist.comm import Comm
from tokscale.train.hooks import Hook
from tokscale.train.metrics import MetricsWriter, read_metrics

log = logger("train")


class BestConfig(Config):
    """What the best checkpoint is, and how long to wait for a better one."""

    metric: str = "held_out/loss"
    """A name of `metrics.jsonl` that is measured at some steps (`held_out/...`, `reconstruction/...`)."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more is better."""
    min_change: float = Field(default=0.0, ge=0)
    """What is better by less does not count."""
    patience: int | None = Field(default=None, ge=1)
    """End the run, done and with exit code 0, after so many measurements in a row that brought nothing better."""


@dataclass(frozen=True)
class Standing:
    """What measurements have shown so far."""

    best: tuple[int, float] | None = None
    """Step and value."""
    since: int = 0
    """Measurements after it."""

    def then(self, step: int, value: float, config: BestConfig) -> "Standing":
        """One more measurement."""
        if not math.isfinite(value):
            return Standing(self.best, self.since + 1)
        sign = 1 if config.mode == "min" else -1
        if self.best is None or sign * (self.best[1] - value) > config.min_change:
            return Standing((step, value))
        return Standing(self.best, self.since + 1)

    def over(self, config: BestConfig) -> bool:
        """Whether nothing better came for too long."""
        return config.patience is not None and self.best is not None and self.since >= config.patience


def standing(rows: Sequence[Mapping[str, Any]], config: BestConfig, step: int | None = None) -> Standing:
    """What the lines of `metrics.jsonl` say, those up to `step`."""
    found = Standing()
    for row in rows:
        if config.metric in row and (step is None or row["step"] <= step):
            value = row[config.metric]
            found = found.then(row["step"], math.nan if value is None else value, config)
    return found


class Best(Hook):
    """Has every step saved that is the best so far, and ends the run when its patience is over."""

    def __init__(self, config: BestConfig, comm: Comm, run_dir: Path):
        """Look at the metrics of a run folder, whose `checkpoints/best.json` names the best."""
        self._config, self._comm, self._run_dir = config, comm, run_dir
        self._now = Standing()

    def on_begin(self, step: int, writer: MetricsWriter | None) -> None:
        """Take up what an earlier process measured."""
        del writer
        self._now = self._comm.on_main(
            "looking at what was measured", lambda: standing(read_metrics(self._run_dir), self._config, step)
        )
        self._end()

    def on_step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Compare, where the metric was measured."""
        self.wants_save = False
        if self._config.metric not in metrics:
            return
        value = metrics[self._config.metric]
        self._now = self._now.then(step, math.nan if value is None else value, self._config)
        self.wants_save = self._now.best is not None and self._now.best[0] == step
        if self.wants_save and self._comm.is_main:
            write_best(self._run_dir / "checkpoints", step, self._config.metric, value)
        self._end()

    def on_end(self, step: int) -> None:
        """Say what was best."""
        if self._now.best is None:
            log.warning(
                "best.metric=%s was never measured in %d steps; metrics.jsonl names what is, and held_out/... needs "
                "data.held_out",
                self._config.metric,
                step,
            )
        else:
            at, value = self._now.best
            log.info("best: step %d with %s %.6g", at, self._config.metric, value)

    def _end(self) -> None:
        if self._now.over(self._config) and not self.ended:
            self.ended = True
            assert self._now.best is not None
            log.info(
                "ending early: %s was best at step %d (%.6g), nothing better in %d measurements since",
                self._config.metric,
                *self._now.best,
                self._now.since,
            )
