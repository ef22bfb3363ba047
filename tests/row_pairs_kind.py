"""An attention kind from outside: pairs of rows. All of it is here; importing this module adds it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokscale.nn.attention.fast import PartitionedAttention
from tokscale.nn.attention.kinds.grid import GridKind
from tokscale.nn.attention.partition import RowsOrColumns
from tokscale.nn.attention.pattern import AttentionPattern, FastPath, attention_kind
from tokscale.nn.attention.retention import Retention
from tokscale.nn.layout import TokenLayout


@attention_kind
class RowPairs(GridKind):
    """An image position sees its own row and the other one of the pair."""

    name = "row_pairs"
    backends = ("dense", "sdpa", "fast", "flex")

    def near(self, pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
        pair = 2 * pattern.layout.grid_w
        return torch.div(query, pair, rounding_mode="floor") == torch.div(key, pair, rounding_mode="floor")

    def fast_path(self, pattern: AttentionPattern) -> FastPath | None:
        layout = pattern.layout
        if layout.grid_h % 2:
            return None
        return PartitionedAttention(pattern, Pairs(layout.grid_h // 2, 2 * layout.grid_w, "row", pattern.causal))

    def retention(self, pattern: AttentionPattern) -> Retention:
        return OnePair(pattern.layout)


class Pairs(RowsOrColumns):
    row_multiple = 2


@dataclass(frozen=True)
class OnePair(Retention):
    layout: TokenLayout
    rows = 2

    def first_kept(self, count: int) -> int:
        pair = 2 * self.layout.grid_w
        return count // pair * pair

    def window(self, position: int, device: torch.device) -> slice:
        del device
        return slice(0, position % (2 * self.layout.grid_w) + 1)
