"""A step that is queued: what it was, and what the ranks will have told each other in it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tokscale.base.batch import Batch, StepReport, StepResult
from tokscale.dist.comm import Comm
from tokscale.dist.message import Message, Value

PREFIX = "loop/"
"""Of the loop's own entries in a step's message."""


@dataclass(frozen=True)
class StepMessage:
    """A step's message, as it was read."""

    metrics: dict[str, float]
    """Of the task, as means over ranks."""
    totals: Mapping[str, float]
    """The loop's own numbers, as sums over ranks."""
    several: Mapping[str, list[float]]
    """Those that were sent as several."""


class InFlight:
    """One step between its kernels' launch and the reading of its message."""

    def __init__(
        self, step: int, batch: Batch, waited: float, result: StepResult, notes: Mapping[str, Value], comm: Comm
    ):
        """Take note of a step that was just queued. Collective when no engine's message carried all there is to tell.

        Args:
            step: Its number, from 0.
            batch: What it trained on.
            waited: Seconds that the loop waited for the batch.
            result: Of the task.
            notes: What the loop asked each engine to carry; the first that took a step did.
            comm: The job.
        """
        self.step, self.batch, self.waited, self.result = step, batch, waited, result
        self.idle: Idle | None = None
        self.queued_at = time.perf_counter()
        self._notes, self._world = notes, comm.world
        carriers = (report for report in result.reports.values() if notes.keys() <= report.carries)
        self._carrier: StepReport | None = next(carriers, None)
        own: dict[str, Value] = {} if result.averaged else dict(result.metrics)
        own |= notes if self._carrier is None else {}
        self._own = Message(comm, own) if own else None

    def read(self) -> StepMessage:
        """Wait for the message."""
        own, world = self._own, self._world
        if self.result.averaged or own is None:
            metrics = dict(self.result.metrics)
        else:
            metrics = {name: own.totals[name] / world for name in self.result.metrics}
        totals, several = {}, {}
        for name, value in self._notes.items():
            short = name.removeprefix(PREFIX)
            if isinstance(value, float | torch.Tensor):
                told = own.totals[name] if self._carrier is None and own else self._outcome.carried[name] * world
                totals[short] = told
            else:
                told = own.several(name) if self._carrier is None and own else self._outcome.several[name]
                several[short] = list(told)
        return StepMessage(metrics, totals, several)

    @property
    def _outcome(self):
        assert self._carrier is not None
        return self._carrier.outcome


class Idle:
    """The time that a CUDA device had nothing to do between two steps."""

    def __init__(self, before: torch.cuda.Event | None):
        """The next step begins now; `before` was recorded at the end of the one before it."""
        self._before = before
        self._begin = torch.cuda.Event(enable_timing=True)
        self._begin.record()

    @staticmethod
    def mark() -> torch.cuda.Event:
        """All of a step is queued."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Once this step's message was read, so that both places have been passed."""
        return 0.0 if self._before is None else self._before.elapsed_time(self._begin) / 1e3
