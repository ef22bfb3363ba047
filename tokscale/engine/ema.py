"""Exponential moving averages native to the partition: each rank averages the masters it owns."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tokscale.engine.fragments import Fragment


class Averages:
    """Averages of the fp32 masters, one per decay, on the local fragments: no communication, whatever the engine.

    The decay ramps up with the updates, `min(decay, (1 + updates) / (10 + updates))`, so that the random start is
    forgotten early.
    """

    def __init__(self, decays: tuple[float, ...], fragments: list[Fragment]):
        self._weights = [fragment.weight for fragment in fragments]
        self.values = {decay: [weight.clone() for weight in self._weights] for decay in decays}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights as update number `updates`, counted from 1, left them."""
        for decay, averages in self.values.items():
            ramped = min(decay, (1 + updates) / (10 + updates))
            torch._foreach_lerp_(averages, self._weights, 1 - ramped)  # pyright: ignore[reportPrivateImportUsage]

    def slots(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """`(slot, flat tensor)` of each average of fragment number `index`."""
        for decay, averages in self.values.items():
            yield ema_slot(decay), averages[index]


def ema_slot(decay: float) -> str:
    """The checkpoint slot of an average, e.g. `ema/0.9999`."""
    return f"ema/{decay!r}"
