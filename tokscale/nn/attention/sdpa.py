"""PyTorch's fused attention with a causal flag or a dense boolean mask."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from tokscale.base.shapes import Bool, Float, Shaped, Tensor
from tokscale.nn.attention.pattern import AttentionPattern
from tokscale.nn.attention.reference import visible_mask


def sdpa_attention(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch heads seq dim_head"],
    v: Float[Tensor, "batch heads seq dim_head"],
    pattern: AttentionPattern,
    key_mask: Bool[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch heads seq dim_head"]:
    """The same function as `dense_attention`. No score matrix is kept, but masked blocks are computed all the same."""
    if pattern.parts.is_full and key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=pattern.causal)
    if pattern.parts.is_full and not pattern.causal and key_mask is not None:
        return fused_attention(q, k, v, key_mask[:, None, None, :])
    return fused_attention(q, k, v, visible_mask(pattern, q.shape[-2], q.device, key_mask))


def fused_attention(
    q: Float[Tensor, "batch heads queries dim_head"],
    k: Float[Tensor, "batch heads keys dim_head"],
    v: Float[Tensor, "batch heads keys dim_head"],
    mask: Shaped[Tensor, "batch_or_one heads_or_one queries_or_one keys"] | None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries dim_head"]:
    """PyTorch's fused attention under a mask, on GPUs by a kernel that can be trusted with one.

    On H100 and later PyTorch takes cuDNN's kernel first, whose backward pass can give NaN under a mask where the number
    of keys is 64 more than a multiple of 128 (torch 2.11 to 2.13, https://github.com/pytorch/pytorch/issues/196678).
    Without it the memory-efficient kernel is taken; flash attention knows no masks.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: True where a key is seen, or what is added to the scores, in their type; None shows all.
        dropout: Of the probabilities.
        scale: Of the scores, `dim_head ** -0.5` when left out.
    """
    if mask is None or not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    with _without_cudnn():
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)
