"""A layer: two pre-norm branches, each with its own norm and scale around a function that may be shared."""

import torch
from torch import nn

from tokscale.base.shapes import Float, Tensor
from tokscale.nn.config import StackConfig
from tokscale.nn.layout import TokenLayout
from tokscale.nn.shift import shift_tokens


class LayerScale(nn.Module):
    """A learned factor per channel, small at first and smaller in deep layers (CaiT, arXiv:2103.17239)."""

    def __init__(self, dim: int, layer: int) -> None:
        """`layer` counts from 1."""
        super().__init__()
        start = 0.1 if layer <= 18 else 1e-5 if layer <= 24 else 1e-6
        self.scale = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        """`x`, scaled channel by channel."""
        return x * self.scale


class Branch(nn.Module):
    """What surrounds one function of a layer: norm and token shift before it, norm and scale after it."""

    def __init__(self, config: StackConfig, layout: TokenLayout, layer: int) -> None:
        super().__init__()
        self.layout = layout
        self.shifts = config.shift_tokens
        self.norm = nn.LayerNorm(config.dim)
        self.norm_out = nn.LayerNorm(config.dim) if config.sandwich_norm else nn.Identity()
        self.scale = LayerScale(config.dim, layer) if config.layer_scale else nn.Identity()

    def pre(
        self, x: Float[Tensor, "batch seq dim"], *, offset: int = 0, history: Tensor | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        """The function's input. `history` is this branch's memory of unshifted tokens, with a cache."""
        x = self.norm(x)
        return shift_tokens(x, self.layout, offset=offset, history=history) if self.shifts else x

    def post(self, y: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        """The branch's contribution to the residual stream, from the function's output."""
        return self.scale(self.norm_out(y))


class Layer(nn.Module):
    """The layer's own parameters; its attention and feed-forward belong to the stack, which may share them."""

    def __init__(self, config: StackConfig, layout: TokenLayout, layer: int) -> None:
        super().__init__()
        self.attn = Branch(config, layout, layer)
        self.ff = Branch(config, layout, layer)
