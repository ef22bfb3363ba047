"""Differentiable samples of a categorical distribution."""

import torch
import torch.nn.functional as F

from tokscale.base.shapes import Float, Tensor


def relaxed_sample(
    logits: Float[Tensor, "batch vocab grid_h grid_w"], temperature: float, *, straight_through: bool, reinmax: bool
) -> Float[Tensor, "batch vocab grid_h grid_w"]:
    """Gumbel-softmax over the vocabulary axis, from torch's default generator.

    Logits and noise are fp32 whatever the caller's dtype: in bf16 the noise has a few hundred distinct values, and
    ties favour low ids.

    Args:
        logits: Unnormalised log-probabilities.
        temperature: Of the softmax; near 0 the sample is nearly one-hot.
        straight_through: Give one-hot samples with the gradient of the soft ones.
        reinmax: Give them the second-order gradient of ReinMax (arXiv:2304.08612, algorithm 2) instead.
    """
    logits = logits.float()
    sample = F.gumbel_softmax(logits, tau=temperature, hard=straight_through, dim=1)
    return _with_reinmax_gradient(sample.detach(), logits, temperature) if reinmax else sample


def _with_reinmax_gradient(
    one_hot: Float[Tensor, "batch vocab grid_h grid_w"],
    logits: Float[Tensor, "batch vocab grid_h grid_w"],
    temperature: float,
) -> Float[Tensor, "batch vocab grid_h grid_w"]:
    # Heun's method: the gradient at the sample's own distribution and at the midpoint, extrapolated.
    plain = logits.softmax(dim=1)
    midpoint = (one_hot + (logits / temperature).softmax(dim=1)) / 2
    log_midpoint = torch.log(midpoint.clamp(min=1e-20))
    midpoint = ((log_midpoint - logits).detach() + logits).softmax(dim=1)
    carrier = 2 * midpoint - plain / 2
    return carrier - carrier.detach() + one_hot
