"""FlexAttention: the pattern's own mask, with the blocks it leaves empty skipped. For GPUs.

Blocks of 128 can be skipped only if the mask's borders fall on them, so positions may be reordered first: the text
padded to whole blocks, and columns made contiguous for a column pattern (in raster order every block of it is live).

A compilation takes tens of seconds, and PyTorch gives up after eight of one function. So each pattern has a function of
its own, which is compiled for whole sequences alone and where nothing is trained for any number of them; a shorter
sequence without a backward pass, which is what sampling begins with, takes PyTorch's fused attention.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from einops import rearrange

from tokscale.base.log import logger
from tokscale.base.shapes import Bool, Float, Int, Shaped, Tensor
from tokscale.nn.attention.pattern import AttentionPattern
from tokscale.nn.attention.sdpa import sdpa_attention
from tokscale.nn.regions import with_own_code

BLOCK = 128
"""FlexAttention's own block size, in positions."""
_COMPILE: dict[str, Any] = {}
"""Further arguments of `torch.compile`; tests count with a backend of their own."""
_SMALL_BLOCKS: Any = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64}
"""For masks that read a table of every head: with PyTorch's own blocks of 128 a thread spills 6.6 KB on an H100, with
these nothing (`tests/fake_cuda/sm90.py`)."""
_log = logger("attention")


def block_attention(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch heads seq dim_head"],
    v: Float[Tensor, "batch heads seq dim_head"],
    pattern: AttentionPattern,
) -> Float[Tensor, "batch heads seq dim_head"]:
    """The same function as `dense_attention`, compiled; an uncompiled FlexAttention would build every score."""
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    # Training predicts the first entry from a start token, and nothing from the last one.
    if not trains and q.shape[2] < pattern.layout.seq - 1:
        return sdpa_attention(q, k, v, pattern)
    plan = _plan(pattern, q.shape[2], str(q.device))
    places = [q, k, v]
    if plan.places is not None:
        places = [tensor.index_select(2, plan.places) for tensor in places]
    out = run_compiled(_compiled(replace(pattern, stream=0)), places, plan.mask, any_batch=not trains)
    if out is None:
        _warn_of_the_slow_path(pattern)
        return sdpa_attention(q, k, v, pattern)
    return out if plan.slots is None else out.index_select(2, plan.slots)


def run_compiled(
    attention: Callable[..., Tensor], batched: Sequence[Shaped[Tensor, "..."]], *others: Any, any_batch: bool
) -> Float[Tensor, "batch heads seq dim_head"] | None:
    """What a compiled function gives, or None when it was compiled as often as PyTorch allows.

    Args:
        attention: The function.
        batched: Its first arguments, whose first axis is that of the batch.
        others: Those after them.
        any_batch: Compile it for any size of the batch.
    """
    if any_batch:  # training keeps to one batch size: a function of that one alone is the faster
        for tensor in batched:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    try:
        return attention(*batched, *others)
    except torch._dynamo.exc.FailOnRecompileLimitHit:  # pyright: ignore[reportAttributeAccessIssue] - loaded by then
        return None


@cache
def _warn_of_the_slow_path(pattern: AttentionPattern) -> None:
    _log.warning(
        "%s attention was compiled %d times for sequences of other sizes or types; from here on it is computed exactly "
        "and slowly by scaled_dot_product_attention wherever yet another one would be needed",
        pattern.kind,
        torch._dynamo.config.recompile_limit,
    )


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
    image = pattern.parts.block_order(pattern, raster[text:] - text) + text
    padding = torch.full((-text % BLOCK,), -1, device="cpu")
    candidates = [raster, torch.cat([raster[:text], image]), torch.cat([raster[:text], padding, image])]
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


@lru_cache(maxsize=128)
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
def _compiled(pattern: AttentionPattern) -> Callable[..., Tensor]:
    """A compiled function of this pattern alone; layouts that differ only in their random blocks share one."""
    from torch.nn.attention.flex_attention import flex_attention

    blocks = _SMALL_BLOCKS if pattern.parts.per_head else None

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
        return flex_attention(q, k, v, block_mask=mask, kernel_options=blocks)

    return torch.compile(with_own_code(attention, pattern.kind), fullgraph=True, **_COMPILE)
