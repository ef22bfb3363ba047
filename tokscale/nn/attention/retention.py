"""What decoding keeps of an image's keys, and where each lies: the part of an attention kind that caches ask."""

from abc import ABC, abstractmethod
from typing import TypeVar

import torch

from tokscale.base.shapes import Float, Int, Tensor
from tokscale.nn.layout import TokenLayout

T = TypeVar("T", int, Tensor)


class StepKeys(ABC):
    """Keys that the steps of one layer read in place of its static buffers, for kinds whose window is no view."""

    held: tuple[Tensor, ...]
    """Its buffers."""

    @abstractmethod
    def forget(self) -> None:
        """What was copied may have been overwritten."""

    @abstractmethod
    def step(
        self,
        q: Float[Tensor, "batch heads one dim_head"],
        keys: Float[Tensor, "batch heads total dim_head"],
        values: Float[Tensor, "batch heads total dim_head"],
        position: int,
    ) -> Float[Tensor, "batch heads one dim_head"]:
        """Attention of the query at `position`, whose own key is the last one written to `keys` and `values`."""


class Retention(ABC):
    """Which image keys a pattern keeps, and in which slots. Image positions count from 0 here.

    A slot is reused for a later position once no query sees the former one any more.
    """

    layout: TokenLayout

    @property
    @abstractmethod
    def rows(self) -> int:
        """Image rows that are alive at once."""

    @property
    def slots(self) -> int:
        """Image keys kept."""
        return self.rows * self.layout.grid_w

    @property
    def scratch(self) -> int:
        """Keys of the largest window that has to be copied next to the text; 0 where windows are views at the front."""
        return 0

    def slot(self, position: T) -> T:
        """Where image positions, one or many, are kept."""
        return position % max(1, self.slots)

    def held(self, position: Int[Tensor, ""]) -> Int[Tensor, "slots"]:
        """Which image position lies in each slot once `position` is written; negative or later ones are none.

        The inverse of `slot`, in tensor operations, so that a step of static shape can ask for its mask at a position
        that only the device knows: `mask_mod(position, held(position))`.
        """
        slot = torch.arange(self.slots, device=position.device)
        return position - (position - slot) % max(1, self.slots)

    def front(self, count: int) -> int:
        """How many slots, from the first one on, hold all that is kept of the first `count` image positions."""
        del count
        return self.slots

    def first_kept(self, count: int) -> int:
        """Of the first `count` image positions, the first one that a later query may see."""
        width = max(1, self.layout.grid_w)
        return max(0, (count // width - self.rows + 1) * width) if count else 0

    @abstractmethod
    def window(self, position: int, device: torch.device) -> slice | Int[Tensor, "window"]:
        """Slots of the image keys that the query at `position` sees, itself included."""

    def step_keys(self, like: Float[Tensor, "batch heads total dim_head"]) -> StepKeys | None:
        """What steps read in place of a window, for a layer with such buffers; None where windows do."""
        del like
