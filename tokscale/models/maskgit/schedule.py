"""How many codes are masked when: the law of training and the plan of sampling."""

import math
from functools import cache

import torch

from tokscale.base.kinds import for_each
from tokscale.base.shapes import Float, Tensor
from tokscale.models.maskgit.config import Schedule

SHARES = for_each(
    Schedule,
    {
        "cosine": lambda times, power: torch.cos(times * (math.pi * 0.5)),
        "arccos": lambda times, power: torch.arccos(times) * (2 / math.pi),
        "linear": lambda times, power: 1 - times,
        "pow": lambda times, power: 1 - times**power,
    },
)
"""The share of codes masked, by the times and the power of `pow`."""


def masked_share(times: Float[Tensor, "*times"], schedule: Schedule, power: float = 2.0) -> Float[Tensor, "*times"]:
    """The share of codes masked at each time: 1 at time 0, 0 at time 1."""
    return SHARES[schedule](times, power)


@cache
def expected_masked(count: int, schedule: Schedule, power: float, minimum: float) -> float:
    """How many of `count` codes training masks on average over uniform times."""
    times = (torch.arange(1 << 14, dtype=torch.float64) + 0.5) / (1 << 14)
    return training_masked(masked_share(times, schedule, power), count, minimum).mean().item()


def training_masked(share: Float[Tensor, "*batch"], count: int, minimum: float) -> Float[Tensor, "*batch"]:
    """Whole numbers of codes to mask: at least one, and at least the minimum rate."""
    return (count * share.clamp(min=minimum)).round().clamp(min=1)
