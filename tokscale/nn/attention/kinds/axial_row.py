"""`axial_row`: all text, and the own row of the image."""

from dataclasses import dataclass

import torch

from tokscale.base.shapes import Tensor
from tokscale.nn.attention.fast import PartitionedAttention
from tokscale.nn.attention.kinds.grid import GridKind, rows_between
from tokscale.nn.attention.partition import RowsOrColumns
from tokscale.nn.attention.pattern import AttentionPattern, FastPath, attention_kind
from tokscale.nn.attention.retention import Retention
from tokscale.nn.layout import TokenLayout


@attention_kind
class AxialRow(GridKind):
    """Rows of the grid are sequences of their own (arXiv:1912.12180)."""

    name = "axial_row"
    backends = ("dense", "sdpa", "fast", "flex")

    def near(self, pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
        """The same row."""
        return rows_between(pattern, query, key) == 0

    def fast_path(self, pattern: AttentionPattern) -> FastPath:
        """Row by row."""
        layout = pattern.layout
        return PartitionedAttention(pattern, RowsOrColumns(layout.grid_h, layout.grid_w, "row", pattern.causal))

    def retention(self, pattern: AttentionPattern) -> Retention:
        """One row."""
        return OneRow(pattern.layout)


@dataclass(frozen=True)
class OneRow(Retention):
    """The row at hand, which the next one overwrites from its start."""

    layout: TokenLayout

    @property
    def rows(self) -> int:
        """The one at hand."""
        return 1

    def window(self, position: int, device: torch.device) -> slice:
        """The row so far."""
        del device
        return slice(0, position % self.layout.grid_w + 1)
