"""Which query may see which key: the one definition that every way of computing attention is held to."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch

from tokscale.base.errors import ConfigError
from tokscale.base.rng import seed_of
from tokscale.base.shapes import Bool, Int, Tensor
from tokscale.nn.attention.sparsity import BlockGrid, SparseLayout, VariableLayout
from tokscale.nn.config import AttentionKind
from tokscale.nn.layout import TokenLayout


@dataclass(frozen=True)
class AttentionPattern:
    """A boolean function of a query and a key position, over a token layout.

    Text sees text; a picture token sees all text, and of the picture what its kind shows. In a causal pattern nobody
    sees a later position. Hashable: tables that derive from it are made once.

    Raises:
        ConfigError: When the kind cannot be had over this layout, or not in this direction.
    """

    kind: AttentionKind
    layout: TokenLayout
    causal: bool = True
    heads: int = 1
    kernel_size: int = 5
    dilation: int = 1
    conv_window: Literal["seed", "raster"] = "seed"
    sparse: SparseLayout = field(default_factory=VariableLayout)
    stream: int = 0
    """Tells apart the random blocks of different attention functions."""

    def __post_init__(self) -> None:
        if self.kind in ("axial_row", "axial_col", "conv_like") and not self.layout.image:
            raise ConfigError(
                f"attn_types: {self.kind!r} needs a picture grid; a text-only sequence takes full or sparse"
            )
        if self.kind == "conv_like" and not self.causal and self.conv_window == "seed":
            raise ConfigError(
                "conv_window: 'seed' sees only what lies above and to the left, so it has no bidirectional form; "
                "use conv_window=raster, which is the whole centred window there"
            )
        if self.kind == "sparse":
            self.block_table("cpu")

    def mask_mod(self, device: torch.device | str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The definition: a function of batch, head, query and key indices on `device`, True where query sees key.

        It works element by element over broadcast tensors, by tensor operations only, so that FlexAttention can compile
        it; what it looks up is made here, outside.
        """
        text, table = self.layout.text, self.block_table(device) if self.kind == "sparse" else None

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            del batch
            ordered = key <= query if self.causal else (key >= 0) & (query >= 0)
            if self.kind == "full":
                return ordered
            if table is not None:
                return table[head, query // self.sparse.block, key // self.sparse.block] & ordered
            return ((key < text) | ((query >= text) & self._near(query - text, key - text))) & ordered

        return sees

    def _near(self, query: Int[Tensor, "*queries"], key: Int[Tensor, "*keys"]) -> Bool[Tensor, "*cells"]:
        width = self.layout.grid_w
        down = torch.div(query, width, rounding_mode="floor") - torch.div(key, width, rounding_mode="floor")
        right = query % width - key % width
        if self.kind == "axial_row":
            return down == 0
        if self.kind == "axial_col":
            return right == 0
        reach = (self.kernel_size - 1) * self.dilation
        low, high = (0, reach) if self.conv_window == "seed" else (-(reach // 2), reach // 2)
        inside = (down >= low) & (down <= high) & (right >= low) & (right <= high)
        return inside & (down % self.dilation == 0) & (right % self.dilation == 0)

    def visible(
        self, query: Int[Tensor, "queries"], key: Int[Tensor, "keys"]
    ) -> Bool[Tensor, "heads_or_one queries keys"]:
        """The mask between chosen positions. Heads are told apart only where the pattern does."""
        count = self.heads if self.kind == "sparse" else 1
        head = torch.arange(count, device=query.device)
        head = head[:, None, None]
        return self.mask_mod(query.device)(head, head, query[None, :, None], key[None, None, :])

    def dense(self, length: int, device: torch.device | str) -> Bool[Tensor, "heads_or_one length length"]:
        """The whole mask of the first `length` positions."""
        return _dense(self, length, str(device))

    def block_table(self, device: torch.device | str) -> Bool[Tensor, "heads blocks blocks"]:
        """The layout of a `sparse` pattern; its last block may be ragged."""
        return _block_table(self, str(device))

    def pairs(self, length: int) -> int:
        """Visible (query, key) cells of the first `length` positions, averaged over heads."""
        mask = self.dense(length, "cpu")
        return int(mask.sum()) // mask.shape[0]


@lru_cache(maxsize=8)
def _dense(pattern: AttentionPattern, length: int, device: str) -> Bool[Tensor, "heads_or_one length length"]:
    with torch.inference_mode(False):
        positions = torch.arange(length, device=device)
        return pattern.visible(positions, positions)


@lru_cache(maxsize=128)
def _block_table(pattern: AttentionPattern, device: str) -> Bool[Tensor, "heads blocks blocks"]:
    block = pattern.sparse.block
    grid = BlockGrid(
        blocks=-(-pattern.layout.seq // block),
        heads=pattern.heads,
        text_blocks=-(-pattern.layout.text // block),
        causal=pattern.causal,
    )
    stream = random.Random(seed_of(pattern.sparse.seed, "sparse", pattern.stream))
    with torch.inference_mode(False):
        return pattern.sparse.make(grid, stream).to(device)
