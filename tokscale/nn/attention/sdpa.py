"""PyTorch's fused attention with a causal flag or a dense boolean mask."""

import torch.nn.functional as F

from tokscale.base.shapes import Bool, Float, Tensor
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
        return F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask[:, None, None, :])
    mask = visible_mask(pattern, q.shape[-2], q.device, key_mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
