"""PyTorch's fused CPU attention, with the log-sum-exp that joins attention over disjoint sets of keys."""

import torch

from tokscale.base.shapes import Float, Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def flash(
    q: Float[Tensor, "batch heads queries dim_head"],
    k: Float[Tensor, "batch heads keys dim_head"],
    v: Float[Tensor, "batch heads keys dim_head"],
    *,
    causal: bool = False,
    mask: Float[Tensor, "batch_or_one heads_or_one queries keys"] | None = None,
) -> tuple[Float[Tensor, "batch heads queries dim_head"], Float[Tensor, "batch heads queries"]]:
    """Attention output, and the log of its softmax's denominator.

    Args:
        q: Queries; scaled by dim_head ** -0.5 inside.
        k: Keys.
        v: Values.
        causal: Query i sees keys 0..i, however many keys there are.
        mask: Added to the scores, in their dtype: 0 or -inf.
    """
    return _forward(q, k, v, 0.0, causal, attn_mask=_whole(mask, q, k))


def flash_backward(
    grad: Float[Tensor, "batch heads queries dim_head"],
    q: Float[Tensor, "batch heads queries dim_head"],
    k: Float[Tensor, "batch heads keys dim_head"],
    v: Float[Tensor, "batch heads keys dim_head"],
    out: Float[Tensor, "batch heads queries dim_head"],
    lse: Float[Tensor, "batch heads queries"],
    *,
    causal: bool = False,
    mask: Float[Tensor, "batch_or_one heads_or_one queries keys"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k` and `v`.

    `out` and `lse` may be those of attention over more keys than these: the probabilities are then the joint
    softmax's, and so the gradients are this set's exact share of the joint ones.
    """
    return _backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=_whole(mask, q, k))


def _whole(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
