"""Several shapes of images in one stream: every global batch is of one of them.

Which one global batch `t` is of, and which of its batches, is a pure function of (samples of each shape, batch size,
seed, `t`), so all ranks agree without a word, at any number of them.

An epoch is one pass over all samples. After `e` epochs a shape of `n` samples has had `e * n // B` batches: what does
not fill a batch of its shape is neither dropped nor padded, it begins the shape's next batch, in a later epoch. Each
sample comes exactly once before any of its shape comes again. In an epoch the batches of all shapes are shuffled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F

from tokscale.base.errors import DataError
from tokscale.base.rng import mix64, seed_of
from tokscale.base.shapes import Int, Tensor


@dataclass(frozen=True)
class _Epoch:
    first: int
    """Number of its first batch."""
    shapes: Int[Tensor, "batches"]
    """Of each of its batches."""
    numbers: Int[Tensor, "batches"]
    """Which of its shape's batches each is, counted from the stream's beginning."""


class ShapeOrder:
    """The endless order over the batches of several shapes."""

    def __init__(self, samples: Sequence[int | Fraction], *, batch_size: int, seed: int, shuffle: bool = True):
        """Describe the order.

        Args:
            samples: Of each shape in an epoch; a fraction where data sets are mixed by weights.
            batch_size: Samples of a global batch.
            seed: Base of the order's named streams.
            shuffle: False gives all batches of the first shape, then those of the next, in every epoch.

        Raises:
            DataError: When a shape has no sample.
        """
        if min(samples) <= 0:
            raise DataError(f"samples of each shape of images: {list(map(float, samples))}; leave out what has none")
        self._samples, self._batch_size = list(map(Fraction, samples)), batch_size
        self._seed, self._shuffle = seed, shuffle
        self._epochs: dict[int, _Epoch] = {}

    def batch(self, number: int) -> tuple[int, int]:
        """The shape of a global batch, and which of that shape's batches it is."""
        epoch = self._epoch(self._epoch_of(number))
        place = number - epoch.first
        return int(epoch.shapes[place]), int(epoch.numbers[place])

    def _before(self, epoch: int) -> list[int]:
        """Batches of each shape before an epoch."""
        return [int(epoch * samples // self._batch_size) for samples in self._samples]

    def _epoch_of(self, number: int) -> int:
        # No shape is ever ahead of its share, so the epoch is this one at least, and few are passed over.
        epoch = int(number * self._batch_size // sum(self._samples))
        while sum(self._before(epoch + 1)) <= number:
            epoch += 1
        return epoch

    def _epoch(self, number: int) -> _Epoch:
        if number in self._epochs:
            return self._epochs[number]
        before, after = self._before(number), self._before(number + 1)
        counts = torch.tensor(after) - torch.tensor(before)
        shapes = torch.arange(len(counts)).repeat_interleave(counts)
        if self._shuffle:
            key = seed_of(self._seed, "order", "shapes", number)
            shapes = shapes[mix64(torch.arange(len(shapes)) ^ key).argsort()]
        seen = F.one_hot(shapes, len(counts)).cumsum(0).gather(1, shapes[:, None])[:, 0]
        # Two epochs are alive at an edge: the one being read ahead and the one being finished.
        for old in list(self._epochs)[:-1]:
            del self._epochs[old]
        made = self._epochs[number] = _Epoch(sum(before), shapes, torch.tensor(before)[shapes] + seen - 1)
        return made
