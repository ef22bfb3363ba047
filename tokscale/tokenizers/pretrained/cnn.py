"""The convolutional autoencoder of taming-transformers (Esser et al. 2021), which LlamaGen and kakaobrain share.

Names of modules are those of taming's checkpoints, so that its weights load as they are.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tokscale.base.shapes import Float, Tensor

Maps = Float[Tensor, "batch _ _ _"]


class CNNEncoder(nn.Module):
    """Images in [-1, 1] to features at `1 / 2 ** (levels - 1)` of their resolution."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        blocks: int,
        attn_levels: Sequence[int],
        z_channels: int,
        inputs: int = 3,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, ch, 3, padding=1)
        width, last = ch, len(ch_mult) - 1
        self.down = nn.ModuleList()
        for index, multiple in enumerate(ch_mult):
            level = Level(width, ch * multiple, blocks, attention=index in attn_levels)
            width = ch * multiple
            if index < last:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width)
        self.norm_out = normalization(width)
        self.conv_out = nn.Conv2d(width, z_channels, 3, padding=1)

    def forward(self, x: Maps) -> Maps:
        """Features before quantization."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class CNNDecoder(nn.Module):
    """Features back to images in [-1, 1]. `up[i]` belongs to resolution level i, so the last one runs first."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        blocks: int,
        attn_levels: Sequence[int],
        z_channels: int,
        outputs: int = 3,
    ):
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width)
        levels = []
        for index, multiple in reversed(list(enumerate(ch_mult))):
            level = Level(width, ch * multiple, blocks + 1, attention=index in attn_levels)
            width = ch * multiple
            if index:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = normalization(width)
        self.conv_out = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, z: Maps) -> Maps:
        """Images; values a little outside [-1, 1] occur."""
        return self.conv_out(self.hidden(z))

    def hidden(self, z: Maps) -> Maps:
        """What the last convolution turns into images."""
        x = self.mid(self.conv_in(z))
        for index in reversed(range(len(self.up))):
            x = self.up[index](x)
        return F.silu(self.norm_out(x))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where asked for, then a change of resolution."""

    def __init__(self, inputs: int, outputs: int, blocks: int, *, attention: bool):
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(outputs if index else inputs, outputs) for index in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outputs) for _ in range(blocks if attention else 0))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Maps) -> Maps:
        """All blocks in order."""
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x = resample(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, width: int):
        super().__init__()
        self.block_1 = ResidualBlock(width, width)
        self.attn_1 = AttentionBlock(width)
        self.block_2 = ResidualBlock(width, width)

    def forward(self, x: Maps) -> Maps:
        """In order."""
        return self.block_2(self.attn_1(self.block_1(x)))


class ResidualBlock(nn.Module):
    """Two pre-normalised 3x3 convolutions beside an identity, or beside a 1x1 convolution where the width changes."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = normalization(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = normalization(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Maps) -> Maps:
        """Add what the convolutions find."""
        found = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return found + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Single-head attention of every place to every place."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = normalization(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Maps) -> Maps:
        """Add what attention gathers."""
        normed = self.norm(x)
        q, k, v = (rearrange(layer(normed), "b d h w -> b 1 (h w) d") for layer in (self.q, self.k, self.v))
        gathered = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(gathered, "b 1 (h w) d -> b d h w", h=x.shape[-2]))


class Downsample(nn.Module):
    """A stride of two that looks right and down: padding at those edges only, as the weights expect."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Maps) -> Maps:
        """Half the resolution."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Maps) -> Maps:
        """Twice the resolution."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def normalization(width: int) -> nn.GroupNorm:
    """The family's normalization: 32 groups, or fewer where the width does not divide."""
    return nn.GroupNorm(math.gcd(32, width), width, eps=1e-6)
