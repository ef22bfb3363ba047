"""Memory of images that is used again: to fault in fresh pages takes a tenth of the time of decoding an image."""

from collections.abc import Sequence

import torch

from tokscale.base.shapes import Tensor, UInt8


class ImageMemory:
    """Hands out memory for images, that was given back before anything new. Safe to use from several threads."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[Tensor]] = {}

    def take(self, shape: tuple[int, ...]) -> UInt8[Tensor, "*shape"]:
        """Room of this shape with anything in it."""
        try:
            return self._free.setdefault(shape, []).pop()
        except IndexError:
            return torch.empty(shape, dtype=torch.uint8)

    def give(self, room: UInt8[Tensor, "*shape"]) -> None:
        """Take back what is not read any more."""
        self._free.setdefault(tuple(room.shape), []).append(room)


class Stacker:
    """Makes batches of a fixed size, each of them in the memory of the one before."""

    def __init__(self, batch: int, device: torch.device):
        """Prepare.

        Args:
            batch: Images of a batch, variants counted.
            device: Where batches go.
        """
        self._batch, self._device = batch, device
        self._buffers: dict[tuple[int, ...], Tensor] = {}

    def stack(
        self, pixels: Sequence[UInt8[Tensor, "variants channels height width"]]
    ) -> UInt8[Tensor, "batch channels height width"]:
        """All variants of some images on the device, filled up with black; good until the next call."""
        shape, count = (self._batch, *pixels[0].shape[1:]), sum(len(entry) for entry in pixels)
        if shape not in self._buffers:
            self._buffers[shape] = torch.empty(shape, dtype=torch.uint8)
        made = self._buffers[shape]
        torch.cat(list(pixels), out=made[:count])
        made[count:] = 0
        return made.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else made
