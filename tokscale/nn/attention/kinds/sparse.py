"""`sparse`: blocks of keys, by a layout of `sparsity.py`."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange

from tokscale.base.shapes import Float, Int, Tensor
from tokscale.nn.attention.blocksparse import BlockRows, block_table
from tokscale.nn.attention.kinds.full import WholeImage
from tokscale.nn.attention.pattern import AttentionKind, AttentionPattern, FastPath, MaskMod, attention_kind, in_order
from tokscale.nn.attention.retention import Retention, StepKeys
from tokscale.nn.attention.sdpa import fused_attention


@attention_kind
class Sparse(AttentionKind):
    """Block-sparse attention over text and image alike, each head with its own table."""

    name = "sparse"
    backends = ("dense", "sdpa", "fast", "flex")
    needs_grid = False
    per_head = True
    is_random = True

    def check(self, pattern: AttentionPattern) -> None:
        """A layout that the sequence is too short for says so."""
        block_table(pattern, "cpu")

    def mask_mod(self, pattern: AttentionPattern, device: torch.device | str) -> MaskMod:
        """Visible blocks, and order within them."""
        table, block = block_table(pattern, device), pattern.sparse.block

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            del batch
            return table[head, query // block, key // block] & in_order(pattern, query, key)

        return sees

    def fast_path(self, pattern: AttentionPattern) -> FastPath:
        """Row of blocks by row of blocks."""
        return BlockRows(pattern)

    def retention(self, pattern: AttentionPattern) -> Retention:
        """Everything, and a copy of what the row of blocks at hand sees."""
        return BlockRetention(pattern.layout, pattern)


@dataclass(frozen=True)
class BlockRetention(WholeImage):
    """Every position is kept, and steps read their blocks side by side."""

    pattern: AttentionPattern

    def step_keys(self, like: Float[Tensor, "batch heads total dim_head"]) -> StepKeys:
        """The blocks that one row of blocks sees."""
        return SeenBlocks(self.pattern, like)


class SeenBlocks(StepKeys):
    """For the steps of a `sparse` layer: the keys that one row of blocks sees, side by side.

    Made anew when a step comes to another row of blocks, or after anything but a step wrote. The blocks of a head that
    sees fewer than another are followed by keys that a mask hides.
    """

    def __init__(self, pattern: AttentionPattern, like: Float[Tensor, "batch heads total dim_head"]) -> None:
        self.pattern = pattern
        before = block_table(pattern, "cpu").tril(-1).sum(dim=2).max()
        width = (int(before) + 1) * pattern.sparse.block
        self.held = tuple(like.new_zeros(*like.shape[:2], width, like.shape[3]) for _ in range(2))
        self._row = -1

    def forget(self) -> None:
        """What was copied may have been overwritten."""
        self._row = -1

    def step(
        self,
        q: Float[Tensor, "batch heads one dim_head"],
        keys: Float[Tensor, "batch heads total dim_head"],
        values: Float[Tensor, "batch heads total dim_head"],
        position: int,
    ) -> Float[Tensor, "batch heads one dim_head"]:
        """Attention of the query at `position`, whose own key is the last one written."""
        row, inside = divmod(position, self.pattern.sparse.block)
        before, mask = _blocks_before(self.pattern, row, str(q.device), q.dtype)
        past = 0 if before is None else before.shape[1]
        if row != self._row:
            self._copy(keys, values, row, before)
        else:
            for store, kept in zip((keys, values), self.held, strict=True):
                kept[:, :, past + inside] = store[:, :, position]
        stop = past + inside + 1
        shown = None if mask is None else mask[:, :, :, :stop]
        near, far = (kept[:, :, :stop] for kept in self.held)
        return fused_attention(q, near, far, shown)

    def _copy(self, keys: Tensor, values: Tensor, row: int, before: Tensor | None) -> None:
        block = self.pattern.sparse.block
        past = 0 if before is None else before.shape[1]
        for store, kept in zip((keys, values), self.held, strict=True):
            own = store[:, :, row * block : (row + 1) * block]
            kept[:, :, past : past + own.shape[2]] = own
            if before is not None:
                index = before[None, :, :, None].expand(len(store), -1, -1, store.shape[3])
                torch.gather(store, 2, index, out=kept[:, :, :past])
        self._row = row


@lru_cache(maxsize=1024)
def _blocks_before(
    pattern: AttentionPattern, row: int, device: str, dtype: torch.dtype
) -> tuple[Int[Tensor, "heads keys"] | None, Float[Tensor, "one heads one seen"] | None]:
    """Positions of the keys in earlier blocks that a row of blocks sees, for each head as many as for the busiest.

    And what is added to the scores, the row's own block included, where heads see different numbers of blocks.
    """
    with torch.inference_mode(False):
        table = block_table(pattern, "cpu")[:, row, : row + 1]
        counts = table[:, :row].sum(dim=1)
        most = int(counts.max())
        order = table[:, :row].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        inside = torch.arange(pattern.sparse.block)
        places = rearrange(order[:, :, None] * pattern.sparse.block + inside, "h blocks inside -> h (blocks inside)")
        hidden = rearrange(torch.arange(most) >= counts[:, None], "h blocks -> h blocks 1")
        own = rearrange(~table[:, row:], "h 1 -> h 1 1")
        hidden = torch.cat([hidden, own], dim=1).expand(-1, -1, pattern.sparse.block)
        mask = None
        if hidden.any():
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)
            mask = rearrange(mask, "h blocks inside -> 1 h 1 (blocks inside)").to(device)
        return places.to(device) if most else None, mask
