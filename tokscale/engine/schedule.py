"""Learning-rate schedules as pure functions of the update's number: nothing to save, nothing to restore."""

import math

from tokscale.base.errors import ConfigError
from tokscale.engine.config import ScheduleConfig


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
                f"schedule: warmup_steps={config.warmup_steps} and hold_steps={config.hold_steps} together exceed "
                f"the run's {total_steps} steps; shorten them or train longer"
            )

    def __call__(self, step: int) -> float:
        """The factor in [0, 1] at update `step`; beyond the last update, that of the last."""
        config = self.config
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if step < self.start or config.kind == "constant":
            return 1.0
        floor = config.final_ratio
        if config.kind == "inverse_sqrt":
            return max(math.sqrt(max(self.start, 1) / (step + 1)), floor)
        # The first decaying update is still at the peak, the last one exactly at the final ratio.
        done = min((step - self.start) / max(self.total_steps - 1 - self.start, 1), 1.0)
        match config.kind:
            case "cosine":
                return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
            case "linear":
                return floor + (1 - floor) * (1 - done)
            case "exponential":
                return floor**done
