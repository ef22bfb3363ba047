"""The slow oracle: every score, one boolean mask. Every other backend is tested against this one."""

import torch

from tokscale.base.shapes import Bool, Float, Tensor
from tokscale.nn.attention.pattern import AttentionPattern


def dense_attention(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch heads seq dim_head"],
    v: Float[Tensor, "batch heads seq dim_head"],
    pattern: AttentionPattern,
    key_mask: Bool[Tensor, "batch seq"] | None = None,
    *,
    stable: bool = False,
) -> Float[Tensor, "batch heads seq dim_head"]:
    """softmax(q k^T / sqrt(dim_head)) v over the visible keys, in the dtype of its inputs.

    A query that sees no key gets zeros, and no gradient flows through it. `stable` computes the softmax on logits
    divided by 1024 first, as the original does.
    """
    return torch.einsum("bhij,bhjd->bhid", attention_weights(q, k, pattern, key_mask, stable=stable), v)


def attention_weights(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch heads seq dim_head"],
    pattern: AttentionPattern,
    key_mask: Bool[Tensor, "batch seq"] | None = None,
    *,
    stable: bool = False,
) -> Float[Tensor, "batch heads seq seq"]:
    """How much each query takes of each key: 1 in all, or 0 where it sees none."""
    mask = visible_mask(pattern, q.shape[-2], q.device, key_mask)
    scores = torch.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k)
    # Not -inf: a row without any key would become NaN, forward and backward.
    scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
    return (stable_softmax(scores) if stable else scores.softmax(dim=-1)) * mask


def visible_mask(
    pattern: AttentionPattern, length: int, device: torch.device, key_mask: Bool[Tensor, "batch seq"] | None
) -> Bool[Tensor, "batch_or_one heads_or_one seq seq"]:
    """The pattern's mask over the first `length` positions, less the padded keys."""
    mask = pattern.dense(length, device)[None]
    return mask if key_mask is None else mask & key_mask[:, None, None, :]


def stable_softmax(scores: Float[Tensor, "*shape keys"], alpha: float = 1024.0) -> Float[Tensor, "*shape keys"]:
    """The softmax of `scores`, with the largest one taken off after a division by `alpha` (CogView's PB-relax)."""
    scores = scores / alpha
    return ((scores - scores.amax(dim=-1, keepdim=True).detach()) * alpha).softmax(dim=-1)
