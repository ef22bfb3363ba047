"""FlexAttention: the pattern's own mask, with the blocks it leaves empty skipped. For GPUs.

Blocks of 128 can be skipped only if the mask's borders fall on them, so positions may be reordered first: the text
padded to whole blocks, and columns made contiguous for a column pattern (in raster order every block of it is live).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from einops import rearrange

from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.nn.attention.pattern import AttentionPattern

BLOCK = 128
"""FlexAttention's own block size, in positions."""


def block_attention(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch heads seq dim_head"],
    v: Float[Tensor, "batch heads seq dim_head"],
    pattern: AttentionPattern,
) -> Float[Tensor, "batch heads seq dim_head"]:
    """The same function as `dense_attention`, compiled; an uncompiled FlexAttention would build every score."""
    plan = _plan(pattern, q.shape[2], str(q.device))
    if plan.places is not None:
        q, k, v = (tensor.index_select(2, plan.places) for tensor in (q, k, v))
    out = _compiled()(q, k, v, block_mask=plan.mask)
    return out if plan.slots is None else out.index_select(2, plan.slots)


@dataclass(frozen=True)
class _Plan:
    mask: Any
    """FlexAttention's `BlockMask`."""
    places: Int[Tensor, "slots"] | None
    """Which position each slot of the reordered sequence holds; padding repeats position 0, unseen."""
    slots: Int[Tensor, "seq"] | None
    """Where each position went."""


def token_order(pattern: AttentionPattern, length: int) -> Int[Tensor, "slots"]:
    """The order of the first `length` positions that leaves the fewest live blocks; -1 is padding."""
    text = min(pattern.layout.text, length)
    raster = torch.arange(length, device="cpu")
    picture = pattern.parts.block_order(pattern, raster[text:] - text) + text
    padding = torch.full((-text % BLOCK,), -1, device="cpu")
    candidates = [raster, torch.cat([raster[:text], picture]), torch.cat([raster[:text], padding, picture])]
    return min(candidates, key=lambda order: live_blocks(pattern, order))


def live_blocks(pattern: AttentionPattern, order: Int[Tensor, "slots"]) -> int:
    """Blocks of scores that have to be computed in this order, on average over heads."""
    seen = _seen(pattern, order)
    rest = -seen.shape[-1] % BLOCK
    seen = torch.nn.functional.pad(seen, (0, rest, 0, rest))
    blocks = rearrange(seen, "h (q i) (k j) -> h q k i j", i=BLOCK, j=BLOCK).any(-1).any(-1)
    return int(blocks.sum()) // len(blocks)


def _seen(pattern: AttentionPattern, order: Int[Tensor, "slots"]) -> Bool[Tensor, "heads_or_one slots slots"]:
    mask = pattern.dense(int(order.max()) + 1, "cpu")
    places = order.clamp(min=0)
    return mask[:, places[:, None], places] & (order >= 0)[:, None] & (order >= 0)


@lru_cache(maxsize=16)
def _plan(pattern: AttentionPattern, length: int, device: str) -> _Plan:
    from torch.nn.attention.flex_attention import create_block_mask  # brings the compiler: a second to import

    order = token_order(pattern, length)
    with torch.inference_mode(False):
        mask = create_block_mask(
            mask_function(pattern, order.to(device)),
            None,
            pattern.heads if pattern.parts.per_head else None,
            len(order),
            len(order),
            device=device,
            BLOCK_SIZE=BLOCK,
        )
        if torch.equal(order, torch.arange(length, device="cpu")):
            return _Plan(mask, None, None)
        slots = torch.empty(length, dtype=torch.long, device="cpu")
        slots[order[order >= 0]] = torch.arange(len(order), device="cpu")[order >= 0]
        return _Plan(mask, order.clamp(min=0).to(device), slots.to(device))


def mask_function(pattern: AttentionPattern, order: Int[Tensor, "slots"]) -> Callable[..., Tensor]:
    """The pattern's mask over a reordered sequence. The whole of it: FlexAttention may ignore the block table."""
    sees = pattern.mask_mod(order.device)

    def sees_reordered(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query, key = order[query], order[key]
        return sees(batch, head, query.clamp(min=0), key.clamp(min=0)) & (query >= 0) & (key >= 0)

    return sees_reordered


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=False)
