"""`full`: every key, or every earlier one."""

from dataclasses import dataclass

import torch

from tokscale.base.shapes import Tensor
from tokscale.nn.attention.pattern import AttentionKind, AttentionPattern, MaskMod, attention_kind, in_order
from tokscale.nn.attention.retention import Retention
from tokscale.nn.layout import TokenLayout


@attention_kind
class Full(AttentionKind):
    """Dense attention. PyTorch's fused call with a causal flag computes it; nothing is faster."""

    name = "full"
    backends = ("dense", "sdpa", "flex")
    needs_grid = False
    is_full = True

    def mask_mod(self, pattern: AttentionPattern, device: torch.device | str) -> MaskMod:
        """Order alone."""
        del device

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            del batch, head
            return in_order(pattern, query, key)

        return sees

    def fast_path(self, pattern: AttentionPattern) -> None:
        """None: there is nothing to leave out."""
        del pattern

    def retention(self, pattern: AttentionPattern) -> Retention:
        """Everything, in raster order."""
        return WholeImage(pattern.layout)

    def pairs(self, pattern: AttentionPattern, length: int) -> int:
        """A triangle or a square."""
        return length * (length + 1) // 2 if pattern.causal else length * length


@dataclass(frozen=True)
class WholeImage(Retention):
    """Every position is kept where it lies."""

    layout: TokenLayout

    @property
    def rows(self) -> int:
        """All."""
        return self.layout.grid_h

    def front(self, count: int) -> int:
        """As many."""
        return min(count, self.slots)

    def window(self, position: int, device: torch.device) -> slice:
        """All so far."""
        del device
        return slice(0, position + 1)
