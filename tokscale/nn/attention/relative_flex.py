"""Attention with a bias per 2-D offset as one FlexAttention call, for GPUs: `relative.py` in one launch a layer.

The bias is read from its table inside the kernel. In the backward pass the kernel adds to the table's gradient
atomically, so sums come in any order: where torch is asked for deterministic algorithms, `relative.py` reduces it.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from tokscale.base.log import logger
from tokscale.base.shapes import Float, Tensor
from tokscale.nn.attention.flex import BLOCK, run_compiled
from tokscale.nn.attention.relative import Places, relative_attention
from tokscale.nn.regions import with_own_code

_COMPILE: dict[str, Any] = {}
"""Further arguments of `torch.compile`."""
_KERNEL_OPTIONS: Any = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_stages": 1}
"""PyTorch's own choice holds gathered biases in shared memory, too: 240 KB of it, where an H100 has 227."""
_log = logger("attention")


def biased_attention(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch kv_heads keys dim_head"],
    v: Float[Tensor, "batch kv_heads keys dim_head"],
    table: Float[Tensor, "offsets heads"],
    places: Places,
) -> Float[Tensor, "batch heads seq dim_head"]:
    """`relative_attention`, in the way that is fastest where `q` is."""
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v, table))
    if not flex_fits(q, places, trains=trains):
        return relative_attention(q, k, v, table, places)
    k, v = k.to(q.dtype), v.to(q.dtype)
    mask = _mask(q.shape[2], str(q.device))
    out = run_compiled(_compiled(places), (q, k, v), table, mask, any_batch=not trains)
    if out is None:
        _warn_of_the_slow_path(places)
        return relative_attention(q, k, v, table, places)
    return out


def flex_fits(q: Float[Tensor, "batch heads seq dim_head"], places: Places, *, trains: bool) -> bool:
    """Whether FlexAttention computes this: whole sequences, and any that train, on a GPU."""
    if q.device.type != "cuda" or q.dtype == torch.float64 or find_spec("triton") is None:
        return False
    if trains:
        return not torch.are_deterministic_algorithms_enabled()
    return q.shape[2] >= places.grid_h * places.grid_w


def score_function(table: Float[Tensor, "offsets heads"], places: Places) -> Callable[..., Tensor]:
    """FlexAttention's `score_mod`: adds the bias of a query and a key; the null key, the first one, has none."""
    width, (most_rows, most_columns) = places.grid_w, places.table_grid
    first = 1 if places.index == "raster" else 0  # the position of the first code

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch
        at, other = query - first, key - 1 - first
        down = at // width - other // width + most_rows - 1
        right = at % width - other % width + most_columns - 1
        row = down * (2 * most_columns - 1) + right
        if first:
            row = torch.where((at < 0) | (other < 0), places.rows - 1, row)
        # A score that the mask throws away has a row, too.
        bias = table[row.clamp(0, places.rows - 1), head]
        return score + torch.where(key == 0, 0.0, bias)

    return add_bias


def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """FlexAttention's `mask_mod`: a query sees the null key and the positions up to its own."""
    del batch, head
    return key <= query + 1


@lru_cache(maxsize=64)
def _mask(length: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask  # brings the compiler: a second to import

    with torch.inference_mode(False):
        return create_block_mask(sees, None, None, length, length + 1, device=device, BLOCK_SIZE=BLOCK)


@cache
def _compiled(places: Places) -> Callable[..., Tensor]:
    """A compiled function of these places alone, for the tables of all layers."""
    from torch.nn.attention.flex_attention import flex_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, mask: Any) -> Any:
        shares = q.shape[1] != k.shape[1]
        bias = score_function(table, places)
        return flex_attention(
            q, k, v, score_mod=bias, block_mask=mask, enable_gqa=shares, kernel_options=_KERNEL_OPTIONS
        )

    return torch.compile(with_own_code(attention, "relative"), fullgraph=True, **_COMPILE)


@cache
def _warn_of_the_slow_path(places: Places) -> None:
    _log.warning(
        "attention with a bias per offset of %dx%d codes was compiled as often as PyTorch allows, for other "
        "sizes or types; for more it is computed exactly and in more launches",
        places.grid_h,
        places.grid_w,
    )
