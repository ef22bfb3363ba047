"""Learning-rate schedules as pure functions of the update's number: nothing to save, nothing to restore."""

import math

from tokscale.base.errors import ConfigError
from tokscale.base.kinds import for_each
from tokscale.engine.config import ScheduleConfig, ScheduleKind


class Schedule:
    """`schedule(step)` is the factor on the peak learning rate at update `step`, counted from 0."""

    def __init__(self, config: ScheduleConfig, total_steps: int):
        """Fix a schedule to the length of a run.

        Raises:
            ConfigError: When warm-up and hold leave no update of the run.
        """
        self.config = config
        self.total_steps = total_steps
        self.start = config.warmup_steps + config.hold_steps
        if self.start > total_steps:
            raise ConfigError(
                f"schedule.warmup_steps={config.warmup_steps} and schedule.hold_steps={config.hold_steps} together "
                f"exceed the run's {total_steps} steps; shorten them or train longer"
            )

    def __call__(self, step: int) -> float:
        """The factor in [0, 1] at update `step`; beyond the last update, that of the last."""
        config = self.config
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        return 1.0 if step < self.start else DECAYS[config.kind](self, step, config.final_ratio)

    def done(self, step: int) -> float:
        """How much of the decay lies behind: 0 at its first update, which is still at the peak, 1 at the last."""
        return min((step - self.start) / max(self.total_steps - 1 - self.start, 1), 1.0)


def _constant(schedule: Schedule, step: int, floor: float) -> float:
    del schedule, step, floor
    return 1.0


def _cosine(schedule: Schedule, step: int, floor: float) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * schedule.done(step))) / 2


def _linear(schedule: Schedule, step: int, floor: float) -> float:
    return floor + (1 - floor) * (1 - schedule.done(step))


def _exponential(schedule: Schedule, step: int, floor: float) -> float:
    return floor ** schedule.done(step)


def _inverse_sqrt(schedule: Schedule, step: int, floor: float) -> float:
    return max(math.sqrt(max(schedule.start, 1) / (step + 1)), floor)


DECAYS = for_each(
    ScheduleKind,
    {
        "constant": _constant,
        "cosine": _cosine,
        "linear": _linear,
        "inverse_sqrt": _inverse_sqrt,
        "exponential": _exponential,
    },
)
"""The factor after warm-up and hold, from the schedule, the update and the floor."""
