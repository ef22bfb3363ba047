"""`axial_col`: all text, and the own column of the image."""

from dataclasses import dataclass
from typing import TypeVar

import torch

from tokscale.base.shapes import Int, Tensor
from tokscale.nn.attention.fast import PartitionedAttention
from tokscale.nn.attention.kinds.grid import GridKind, columns_between
from tokscale.nn.attention.partition import RowsOrColumns
from tokscale.nn.attention.pattern import AttentionPattern, FastPath, attention_kind
from tokscale.nn.attention.retention import Retention
from tokscale.nn.layout import TokenLayout

T = TypeVar("T", int, Tensor)


@attention_kind
class AxialCol(GridKind):
    """Columns of the grid are sequences of their own (arXiv:1912.12180)."""

    name = "axial_col"
    backends = ("dense", "sdpa", "fast", "flex")

    def near(self, pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
        """The same column."""
        return columns_between(pattern, query, key) == 0

    def fast_path(self, pattern: AttentionPattern) -> FastPath:
        """Column by column."""
        layout = pattern.layout
        return PartitionedAttention(pattern, RowsOrColumns(layout.grid_h, layout.grid_w, "col", pattern.causal))

    def retention(self, pattern: AttentionPattern) -> Retention:
        """Everything, column by column."""
        return Columns(pattern.layout)

    def block_order(self, pattern: AttentionPattern, image: Int[Tensor, "positions"]) -> Int[Tensor, "positions"]:
        """Column by column: in raster order every block is live."""
        return image[(image % pattern.layout.grid_w).argsort(stable=True)]


@dataclass(frozen=True)
class Columns(Retention):
    """Every position is kept, each column contiguous."""

    layout: TokenLayout

    @property
    def rows(self) -> int:
        """All: a column reaches over them."""
        return self.layout.grid_h

    @property
    def scratch(self) -> int:
        """A column."""
        return self.layout.grid_h

    def slot(self, position: T) -> T:
        """By column, then by row."""
        return position % self.layout.grid_w * self.layout.grid_h + position // self.layout.grid_w

    def held(self, position: Int[Tensor, ""]) -> Int[Tensor, "slots"]:
        """The inverse."""
        slot = torch.arange(self.slots, device=position.device)
        return slot % self.layout.grid_h * self.layout.grid_w + slot // self.layout.grid_h

    def window(self, position: int, device: torch.device) -> slice:
        """The column so far."""
        del device
        row, column = divmod(position, self.layout.grid_w)
        return slice(column * self.layout.grid_h, column * self.layout.grid_h + row + 1)
