"""The transformers of ViT-VQGAN: squares of pixels to features and back."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tokscale.base.shapes import Float, Tensor
from tokscale.nn.config import StackConfig
from tokscale.nn.layout import TokenLayout
from tokscale.nn.stack import Stack
from tokscale.tokenizers.vqgan.config import ViTConfig

Maps = Float[Tensor, "batch _ _ _"]


class ViTEncoder(nn.Module):
    """Images in [-1, 1] to features, one per square; the paper's two layers with a tanh between them come last."""

    def __init__(self, config: ViTConfig, inputs: int, grid: int):
        super().__init__()
        self.patches = nn.Conv2d(inputs, config.dim, config.patch_size, stride=config.patch_size)
        self.transformer = Transformer(config.dim, config.depth, config.heads, config.ff_mult, grid)
        self.mix = nn.Linear(config.dim, int(config.dim * config.ff_mult))
        self.out = nn.Linear(int(config.dim * config.ff_mult), config.dim)

    def forward(self, x: Maps) -> Maps:
        """Features before quantization."""
        x = rearrange(self.transformer(self.patches(x)), "b d h w -> b h w d")
        return rearrange(self.out(F.tanh(self.mix(x))), "b h w d -> b d h w")


class ViTDecoder(nn.Module):
    """Features back to images in [-1, 1]."""

    def __init__(self, config: ViTConfig, outputs: int, grid: int):
        super().__init__()
        dim, depth, heads = config.decoder
        self.transformer = Transformer(dim, depth, heads, config.ff_mult, grid)
        self.conv_out = nn.ConvTranspose2d(dim, outputs, config.patch_size, stride=config.patch_size)

    def forward(self, z: Maps) -> Maps:
        """Images; values a little outside [-1, 1] occur."""
        return self.conv_out(self.hidden(z))

    def hidden(self, z: Maps) -> Maps:
        """What the last layer turns into squares of pixels."""
        return self.transformer(z)


class Transformer(nn.Module):
    """Learned positions, bidirectional layers, a final norm."""

    def __init__(self, dim: int, depth: int, heads: int, ff_mult: float, grid: int):
        super().__init__()
        config = StackConfig(
            dim=dim, depth=depth, heads=heads, dim_head=dim // heads, ff_mult=ff_mult, rotary_emb=False
        )
        self.pos_emb = nn.Embedding(grid**2, dim)
        self.stack = Stack(config, TokenLayout(0, grid, grid), causal=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, maps: Maps) -> Maps:
        """As many places as the grid has.

        Raises:
            ConfigError: When there are more.
        """
        x = rearrange(maps, "b d h w -> b (h w) d")
        x = x + self.pos_emb(torch.arange(x.shape[1], device=x.device))
        return rearrange(self.norm(self.stack(x)), "b (h w) d -> b d h w", h=maps.shape[-2])
