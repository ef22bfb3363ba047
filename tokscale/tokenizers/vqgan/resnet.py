"""The convolutional network of muse-maskgit-pytorch's `VQGanVAE`."""

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import nn

from tokscale.base.shapes import Float, Tensor
from tokscale.tokenizers.vqgan.config import ResNetConfig

Maps = Float[Tensor, "batch _ _ _"]
_SLOPE = 0.1


class ResNetEncoder(nn.Module):
    """Images in [-1, 1] to features: strided 4x4 convolutions, each wider, then residual blocks."""

    def __init__(self, config: ResNetConfig, inputs: int):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(inputs, config.dim, 5, padding=2)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))
        self.blocks = nn.ModuleList(Block(config, gated=False) for _ in range(config.num_resnet_blocks))

    def forward(self, x: Maps) -> Maps:
        """Features before quantization."""
        x = self.conv_in(x)
        for layer in self.down:
            x = F.leaky_relu(layer(x), _SLOPE)
        for block in self.blocks:
            x = block(x)
        return x


class ResNetDecoder(nn.Module):
    """Features back to images in [-1, 1]: gated residual blocks, then transposed 4x4 convolutions."""

    def __init__(self, config: ResNetConfig, outputs: int):
        super().__init__()
        widths = config.widths[::-1]
        self.blocks = nn.ModuleList(Block(config, gated=True) for _ in range(config.num_resnet_blocks))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))
        self.conv_out = nn.Conv2d(config.dim, outputs, 1)

    def forward(self, z: Maps) -> Maps:
        """Images; values a little outside [-1, 1] occur."""
        return self.conv_out(self.hidden(z))

    def hidden(self, z: Maps) -> Maps:
        """What the last convolution turns into images."""
        for block in self.blocks:
            z = block(z)
        for layer in self.up:
            z = F.leaky_relu(layer(z), _SLOPE)
        return z


class Block(nn.Module):
    """Two normalised 3x3 convolutions and a 1x1 beside an identity; gated by linear units in the decoder."""

    def __init__(self, config: ResNetConfig, *, gated: bool):
        super().__init__()
        self.gated, width, groups = gated, config.z_channels, math.gcd(config.groups, config.z_channels)
        inner = 2 * width if gated else width
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1)
        self.norm1 = nn.GroupNorm(groups, width, eps=config.eps)
        self.conv2 = nn.Conv2d(width, inner, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=config.eps)
        self.conv3 = nn.Conv2d(width, width, 1)

    def forward(self, x: Maps) -> Maps:
        """Add what the convolutions find."""
        found = x
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            found = norm(F.glu(conv(found), dim=1)) if self.gated else F.leaky_relu(norm(conv(found)), _SLOPE)
        return x + self.conv3(found)
