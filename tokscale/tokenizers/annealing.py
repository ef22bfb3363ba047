"""Quantities that change with training progress: temperatures and loss weights."""

import math
from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from tokscale.base.config import Config
from tokscale.base.kinds import for_each

AnnealingKind = Literal["linear", "cosine", "exponential"]


def _linear(start: float, end: float, progress: float) -> float:
    return start + (end - start) * progress


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _exponential(start: float, end: float, progress: float) -> float:
    return start * (end / start) ** progress


WAYS = for_each(AnnealingKind, {"linear": _linear, "cosine": _cosine, "exponential": _exponential})
"""The value between `start` and `end` at a progress between 0 and 1."""
REACHES_ZERO = for_each(AnnealingKind, {"linear": True, "cosine": True, "exponential": False})
"""Whether an end may be 0 or below."""


class Annealing(Config):
    """A value that goes from `start` to `end` and stays there.

    A closed form of the optimizer step: nothing compounds, and nothing needs saving to resume.
    """

    kind: AnnealingKind = "cosine"
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
        if not REACHES_ZERO[self.kind] and min(self.start, self.end) <= 0:
            raise ValueError(
                f"an {self.kind} annealing cannot go from {self.start} to {self.end}: both must be positive; "
                "use kind: linear or cosine to start from zero"
            )
        return self

    def at(self, step: int) -> float:
        """Value at optimizer step `step`."""
        progress = min(max((step - self.delay) / self.steps, 0.0), 1.0)
        if progress in (0.0, 1.0):
            return self.end if progress else self.start
        return WAYS[self.kind](self.start, self.end, progress)


def value_at(quantity: float | Annealing, step: int) -> float:
    """A constant, or the value of an annealing at optimizer step `step`."""
    return quantity.at(step) if isinstance(quantity, Annealing) else quantity


def extremes(quantity: float | Annealing) -> tuple[float, float]:
    """Smallest and largest value a quantity takes."""
    values = (quantity.start, quantity.end) if isinstance(quantity, Annealing) else (quantity, quantity)
    return min(values), max(values)
