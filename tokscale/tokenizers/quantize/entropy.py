"""The entropy loss of MaskGIT's VQGAN and of lookup-free quantization."""

import torch.nn.functional as F

from tokscale.base.protocols import Collectives, current
from tokscale.base.shapes import Float, Tensor


def entropy_loss(logits: Float[Tensor, "rows vocab"], gamma: float = 1.0) -> Float[Tensor, ""]:
    """Mean entropy of each row's distribution less `gamma` times the entropy of their mean, in nats.

    Low when each row is sure of its code and all codes are used alike.
    """
    log_p = F.log_softmax(logits, dim=-1)
    each = -(log_p.exp() * log_p).sum(dim=-1).mean()
    return each - gamma * entropy(mean_over_ranks(log_p.exp().mean(dim=0)))


def entropy(p: Float[Tensor, "*rest vocab"]) -> Float[Tensor, "*rest"]:
    """In nats over the last axis; its gradient is finite where a probability is zero."""
    return -(p * p.clamp_min(1e-20).log()).sum(dim=-1)


def mean_over_ranks(local: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Mean over ranks with gradient. Every rank must have seen the same number of rows."""
    return current(Collectives).gather_batch(local[None]).mean(dim=0)
