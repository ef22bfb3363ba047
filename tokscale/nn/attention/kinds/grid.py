"""What kinds have in common that see all text, and of the image what lies near on the grid."""

from abc import abstractmethod

import torch

from tokscale.base.shapes import Bool, Int, Tensor
from tokscale.nn.attention.pattern import AttentionKind, AttentionPattern, MaskMod, in_order


class GridKind(AttentionKind):
    """Text sees text; an image position sees all text, and the image positions that `near` tells."""

    needs_grid = True

    @abstractmethod
    def near(
        self, pattern: AttentionPattern, query: Int[Tensor, "*queries"], key: Int[Tensor, "*keys"]
    ) -> Bool[Tensor, "*cells"]:
        """Whether one image position sees another, order aside. Both count from the image's start."""

    def mask_mod(self, pattern: AttentionPattern, device: torch.device | str) -> MaskMod:
        """All text, and what is near in the image."""
        del device
        text = pattern.layout.text

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            del batch, head
            near = self.near(pattern, query - text, key - text)
            return ((key < text) | ((query >= text) & near)) & in_order(pattern, query, key)

        return sees


def rows_between(pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
    """How many rows the key lies above the query."""
    width = pattern.layout.grid_w
    return torch.div(query, width, rounding_mode="floor") - torch.div(key, width, rounding_mode="floor")


def columns_between(pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
    """How many columns the key lies to the left of the query."""
    return query % pattern.layout.grid_w - key % pattern.layout.grid_w
