"""One function decides how attention is computed, and one calls it."""

import torch

from tokscale.base.shapes import Bool, Float, Tensor
from tokscale.nn.attention.pattern import AttentionPattern
from tokscale.nn.attention.reference import dense_attention
from tokscale.nn.attention.sdpa import sdpa_attention
from tokscale.nn.config import Backend


def choose_backend(
    pattern: AttentionPattern, device: torch.device, dtype: torch.dtype, *, grad: bool, masked: bool
) -> Backend:
    """The fastest backend that is exact here. `masked`: a key padding mask is given."""
    del pattern, device, dtype, grad, masked
    return "sdpa"


def attend(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch heads seq dim_head"],
    v: Float[Tensor, "batch heads seq dim_head"],
    pattern: AttentionPattern,
    key_mask: Bool[Tensor, "batch seq"] | None = None,
    *,
    backend: Backend,
    stable: bool = False,
) -> Float[Tensor, "batch heads seq dim_head"]:
    """Attention over the visible keys by the named backend."""
    if backend == "dense":
        return dense_attention(q, k, v, pattern, key_mask, stable=stable)
    return sdpa_attention(q, k, v, pattern, key_mask)
