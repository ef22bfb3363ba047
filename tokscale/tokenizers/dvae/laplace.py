"""The logit-Laplace distribution of the DALL-E paper (Ramesh et al. 2021, appendix A.3): Laplace on the logit scale."""

import math

import torch
import torch.nn.functional as F

from tokscale.base.shapes import Float, Tensor

EPSILON = 0.1
"""Images are squeezed into [EPSILON, 1 - EPSILON], where the density is finite."""


def squeeze(pixels: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Map [0, 1] into [0.1, 0.9]."""
    return (1 - 2 * EPSILON) * pixels + EPSILON


def unsqueeze(squeezed: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Inverse of `squeeze`."""
    return (squeezed - EPSILON) / (1 - 2 * EPSILON)


def logit_laplace_nll(
    location: Float[Tensor, "*shape"], log_scale: Float[Tensor, "*shape"], squeezed: Float[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """Mean negative log-density, in nats per value.

    The density is `exp(-|logit(x) - mu| / b) / (2 b x (1 - x))`.
    """
    distance = (torch.logit(squeezed) - location).abs() * torch.exp(-log_scale)
    return (distance + log_scale + math.log(2) + torch.log(squeezed * (1 - squeezed))).mean()


def most_likely_pixels(location: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Images in [0, 1] from the decoder's location."""
    return unsqueeze(F.sigmoid(location))
