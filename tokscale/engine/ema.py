"""Exponential moving averages native to the partition: each rank averages the masters it owns."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tokscale.base.errors import ConfigError
from tokscale.engine.fragments import Master


class Averages:
    """Averages of the fp32 masters, one per decay, on this rank's part: no communication, whatever the engine.

    The decay ramps up with the updates, `min(decay, (1 + updates) / (10 + updates))`, so that the random start is
    forgotten early. Updates are counted on the device, since the host learns late whether a step was one.
    """

    def __init__(self, decays: tuple[float, ...], masters: list[Master], device: torch.device):
        self._weights = [master.data.detach().view(-1) for master in masters] if decays else []
        self._values = {decay: [weight.clone() for weight in self._weights] for decay in decays}
        self._places = [
            (index, piece.place) for index, master in enumerate(masters) for piece in master.slices if piece.count
        ]
        self._updates = torch.zeros((), dtype=torch.float64, device=device)

    def set_updates(self, updates: int) -> None:
        """Set the number of updates that were taken in."""
        self._updates.fill_(updates)

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Take in the weights as one more update left them; with `found_inf` there was none."""
        if not self._values:
            return
        self._updates += 1 - found_inf
        ramp = (1 + self._updates) / (10 + self._updates)
        for decay, averages in self._values.items():
            # The weights are as they were, and finite, where there was no update: a weight of zero changes nothing.
            weight = torch.where(found_inf > 0, 0.0, 1 - ramp.clamp(max=decay)).float()
            for average, weights in zip(averages, self._weights, strict=True):
                average.lerp_(weights, weight.to(average.device))

    @torch.no_grad()
    def swap(self, slot: str) -> None:
        """Let an average and the weights change places; a second time brings everything back, to the last bit.

        Raises:
            ConfigError: When no such average is kept.
        """
        found = {ema_slot(decay): averages for decay, averages in self._values.items()}
        if slot not in found:
            kept = ", ".join(found) or "none: set engine.ema"
            raise ConfigError(f"weights: got {slot!r}; the averages of this run are {kept}")
        for average, weights in zip(found[slot], self._weights, strict=True):
            before = weights.clone()
            weights.copy_(average)
            average.copy_(before)

    def slots(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """`(slot, flat tensor)` of each average of fragment number `index`."""
        master, place = self._places[index] if self._values else (0, slice(0))
        for decay, averages in self._values.items():
            yield ema_slot(decay), averages[master][place]


def ema_slot(decay: float) -> str:
    """The checkpoint slot of an average, e.g. `ema/0.9999`."""
    return f"ema/{decay!r}"
