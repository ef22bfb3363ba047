"""Layers of the discrete VAE, which start so that its codes live."""

import math

from einops import einsum, rearrange
from torch import nn

from tokscale.base.shapes import Float, Shaped, Tensor


class ReluConv(nn.Conv2d):
    """A convolution before a ReLU that starts by keeping the variance of its input.

    PyTorch's own start shrinks what passes through. All images then begin with nearly uniform logits, every place
    decodes the mean of the codebook, and most codes die before the encoder has learnt to choose.
    """

    def reset_parameters(self) -> None:
        """He et al. 2015."""
        _start(self, variance=2 / (self.in_channels * math.prod(self.kernel_size)))


class ReluUpsample(nn.ConvTranspose2d):
    """The same for a transposed convolution, whose stride divides the weights among the outputs."""

    def reset_parameters(self) -> None:
        """He et al. 2015."""
        _start(self, variance=2 * math.prod(self.stride) / (self.in_channels * math.prod(self.kernel_size)))


class CodeLogits(nn.Conv2d):
    """The last convolution of the encoder, whose logits start with a standard deviation of about 3.

    So codes tell images apart from the first step.
    """

    def reset_parameters(self) -> None:
        """Normal, scaled for inputs of unit variance."""
        _start(self, variance=9 / self.in_channels)


class Codebook(nn.Embedding):
    """Code vectors, read as an embedding of ids or as the expectation under relaxed one-hot vectors.

    Both readings happen inside `forward`, the one place where an engine that partitions parameters has them whole.
    """

    def forward(self, input: Shaped[Tensor, "batch *codes"]) -> Float[Tensor, "batch width grid_h grid_w"]:
        """Code vectors of ids `(batch, grid_h, grid_w)` or of weights `(batch, vocab, grid_h, grid_w)`."""
        if input.is_floating_point():
            return einsum(input.to(self.weight.dtype), self.weight, "b n h w, n d -> b d h w")
        return rearrange(super().forward(input), "b h w d -> b d h w")


class ResBlock(nn.Module):
    """Two 3x3 convolutions and a 1x1 beside an identity."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            ReluConv(width, width, 3, padding=1),
            nn.ReLU(),
            ReluConv(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Float[Tensor, "batch hidden height width"]) -> Float[Tensor, "batch hidden height width"]:
        """Add what the three convolutions find."""
        return self.net(x) + x


def _start(layer: nn.Conv2d | nn.ConvTranspose2d, *, variance: float) -> None:
    nn.init.normal_(layer.weight, std=math.sqrt(variance))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
