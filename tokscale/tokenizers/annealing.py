"""Quantities that change with training progress: temperatures and loss weights."""

import math
from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from tokscale.base.config import Config


class Annealing(Config):
    """A value that goes from `start` to `end` and stays there.

    A closed form of the optimizer step: nothing compounds, and nothing needs saving to resume.
    """

    kind: Literal["linear", "cosine", "exponential"] = "cosine"
    """Shape of the way: straight, half a cosine, or geometric (`start * exp(-rate * step)` until `end`)."""
    start: float
    """Value up to and at step `delay`."""
    end: float
    """Value from step `delay + steps` on."""
    steps: PositiveInt
    """Length of the way in optimizer steps. For the geometric rate `r` of DALLE-pytorch: `ln(start / end) / r`."""
    delay: NonNegativeInt = 0
    """Optimizer steps to wait at `start`."""

    @model_validator(mode="after")
    def _geometric_needs_positive_ends(self) -> Self:
        if self.kind == "exponential" and min(self.start, self.end) <= 0:
            raise ValueError(
                f"an exponential annealing cannot go from {self.start} to {self.end}: both must be positive; "
                "use kind: linear or cosine to start from zero"
            )
        return self

    def at(self, step: int) -> float:
        """Value at optimizer step `step`."""
        progress = min(max((step - self.delay) / self.steps, 0.0), 1.0)
        if progress in (0.0, 1.0):
            return self.end if progress else self.start
        match self.kind:
            case "linear":
                return self.start + (self.end - self.start) * progress
            case "cosine":
                return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2
            case "exponential":
                return self.start * (self.end / self.start) ** progress


def value_at(quantity: float | Annealing, step: int) -> float:
    """A constant, or the value of an annealing at optimizer step `step`."""
    return quantity.at(step) if isinstance(quantity, Annealing) else quantity


def extremes(quantity: float | Annealing) -> tuple[float, float]:
    """Smallest and largest value a quantity takes."""
    values = (quantity.start, quantity.end) if isinstance(quantity, Annealing) else (quantity, quantity)
    return min(values), max(values)
