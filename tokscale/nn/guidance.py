"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) and how strong it is while an image is drawn.

Drawing begins at progress 0 and ends at 1: over the codes of an image for what draws one after the other, over the
steps for what draws many at once. Every family is asked in the same words.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator

from tokscale.base.config import Config
from tokscale.base.kinds import for_each
from tokscale.base.shapes import Float, Int, Tensor
from tokscale.nn.constants import constant
from tokscale.nn.sampling import guide

GuidanceSchedule = Literal["constant", "linear", "cosine", "power"]


class Way(NamedTuple):
    """How guidance goes from its start to its end."""

    share: Callable[[float, float], float]
    """How much of the way lies behind, by the progress and the power."""
    moves: bool = True
    """Whether it has a start of its own."""
    reads_power: bool = False


WAYS = for_each(
    GuidanceSchedule,
    {
        "constant": Way(lambda progress, power: 0.0, moves=False),
        "linear": Way(lambda progress, power: progress),
        "cosine": Way(lambda progress, power: (1 - math.cos(math.pi * progress)) / 2),
        "power": Way(lambda progress, power: progress**power, reads_power=True),
    },
)


class GuidedSampling(Config):
    """Guidance as every family's sampling options have it."""

    cond_scale: float = Field(default=1.0, ge=0)
    """Guidance: `null + (told - null) * cond_scale`; 1 is what is told alone and costs one pass instead of two. With a
    schedule that changes it, that of the last code."""
    cond_scale_schedule: GuidanceSchedule | None = None
    """How it goes from `cond_scale_start` to `cond_scale`: `linear` (Muse, arXiv:2301.00704), along half a `cosine`
    wave, or as the progress to the `power` of `cond_scale_power` (MDT, arXiv:2303.14389). By default `constant`, and
    `linear` when a start is given."""
    cond_scale_start: float | None = Field(default=None, ge=0)
    """Guidance of the first code; 1, which is none, when left out beside a schedule."""
    cond_scale_power: float | None = Field(default=None, gt=0)
    """Exponent of the schedule `power`, 2 when left out: the larger, the later guidance sets in."""
    cond_scale_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only between these two shares of the drawing, ends included, and take what is told alone outside
    (Kynkäänniemi et al. 2024, arXiv:2404.07724)."""

    @model_validator(mode="after")
    def _coherent(self) -> "GuidedSampling":
        if self.cond_scale_start is not None and not self._way.moves:
            raise ValueError("cond_scale_start: a constant scale has none; choose cond_scale_schedule=linear")
        if self.cond_scale_power is not None and not self._way.reads_power:
            raise ValueError(
                "cond_scale_power: is read by cond_scale_schedule=power alone; choose cond_scale_schedule=power"
            )
        first, last = self.cond_scale_interval
        if not 0 <= first <= last <= 1:
            raise ValueError(
                f"cond_scale_interval: got [{first}, {last}]; give two shares of the drawing, 0 <= first <= last <= 1"
            )
        return self

    @property
    def guided(self) -> bool:
        """Whether anything is guided at all, so that the null pass is needed."""
        return not (self.cond_scale == 1 and self._start == 1)

    def scale_at(self, place: int, places: int) -> float:
        """Guidance of the code or step number `place` of `places`; 1 where there is none."""
        progress = place / max(places - 1, 1)
        first, last = self.cond_scale_interval
        if not first <= progress <= last:
            return 1.0
        share = self._way.share(progress, self.cond_scale_power or 2.0)
        return self._start + (self.cond_scale - self._start) * share

    @property
    def _way(self) -> Way:
        return WAYS[self.cond_scale_schedule or ("constant" if self.cond_scale_start is None else "linear")]

    @property
    def _start(self) -> float:
        if self.cond_scale_start is not None:
            return self.cond_scale_start
        return 1.0 if self._way.moves else self.cond_scale

    def guide(
        self, both: Float[Tensor, "rows *vocab"], place: int | Int[Tensor, "1"], places: int
    ) -> Float[Tensor, "batch *vocab"]:
        """Guided logits of the code or step number `place` of `places`.

        Args:
            both: Of the conditional rows, then of as many null rows.
            place: Counted from 0; a tensor where only the device knows it.
            places: Of the whole image.
        """
        conditional, null = both.chunk(2)
        if isinstance(place, Tensor):
            scales = tuple(self.scale_at(number, places) for number in range(places))
            at = constant(scales, both.dtype, both.device).index_select(0, place)
            return torch.where(at == 1, conditional, null + (conditional - null) * at)
        scale = self.scale_at(place, places)
        return conditional if scale == 1 else guide(conditional, null, scale)
