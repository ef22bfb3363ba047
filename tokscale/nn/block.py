"""A layer: two pre-norm branches, each with its own norm and scale around a function that may be shared."""

import torch
import torch.nn.functional as F
from torch import nn

from tokscale.base.shapes import Float, Tensor
from tokscale.nn.attention.decode import DeviceStep
from tokscale.nn.config import StackConfig
from tokscale.nn.layout import TokenLayout
from tokscale.nn.regions import region
from tokscale.nn.shift import shift_tokens


class ShiftedNorm(nn.LayerNorm):
    """A norm, then the token shift of a layout."""

    def __init__(self, dim: int, layout: TokenLayout) -> None:
        super().__init__(dim)
        self.layout = layout

    def forward(
        self,
        input: Float[Tensor, "batch seq dim"],
        *,
        offset: int | DeviceStep = 0,
        history: Tensor | None = None,
        layout: TokenLayout | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """The shifted norm of the positions from `offset` on, by default of the own layout; see `shift_tokens`."""
        layout = layout or self.layout
        if history is None and offset == 0:
            return norm_and_shift(input, self.weight, self.bias, layout=layout, eps=self.eps)
        return shift_tokens(super().forward(input), layout, offset=offset, history=history)


@region()
def norm_and_shift(
    x: Float[Tensor, "batch seq dim"], weight: Tensor, bias: Tensor, *, layout: TokenLayout, eps: float
) -> Float[Tensor, "batch seq dim"]:
    """Normalised tokens with part of their channels from neighbours."""
    return shift_tokens(F.layer_norm(x, weight.shape, weight, bias, eps), layout)


@region()
def add_scaled(
    x: Float[Tensor, "batch seq dim"], y: Float[Tensor, "batch seq dim"], scale: Float[Tensor, " dim"]
) -> Float[Tensor, "batch seq dim"]:
    """The residual stream with a branch's contribution."""
    return x + y * scale


class LayerScale(nn.Module):
    """A learned factor per channel, small at first and smaller in deep layers (CaiT, arXiv:2103.17239)."""

    def __init__(self, dim: int, layer: int) -> None:
        """`layer` counts from 1."""
        super().__init__()
        start = 0.1 if layer <= 18 else 1e-5 if layer <= 24 else 1e-6
        self.scale = nn.Parameter(torch.full((dim,), start))

    def forward(
        self, y: Float[Tensor, "batch seq dim"], x: Float[Tensor, "batch seq dim"] | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        """`y` scaled channel by channel, added to `x` if there is one."""
        return y * self.scale if x is None else add_scaled(x, y, self.scale)


class Branch(nn.Module):
    """What surrounds one function of a layer: norm and token shift before it, norm and scale after it."""

    def __init__(self, config: StackConfig, layout: TokenLayout, layer: int) -> None:
        super().__init__()
        self.norm = ShiftedNorm(config.dim, layout) if config.shift_tokens else nn.LayerNorm(config.dim)
        self.norm_out = nn.LayerNorm(config.dim) if config.sandwich_norm else nn.Identity()
        self.scale = LayerScale(config.dim, layer) if config.layer_scale else nn.Identity()

    def pre(
        self,
        x: Float[Tensor, "batch seq dim"],
        *,
        offset: int | DeviceStep = 0,
        history: Tensor | None = None,
        layout: TokenLayout | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """The function's input. `history` is this branch's memory of unshifted tokens, with a cache."""
        if isinstance(self.norm, ShiftedNorm):
            return self.norm(x, offset=offset, history=history, layout=layout)
        return self.norm(x)

    def post(self, y: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        """The branch's contribution to the residual stream, from the function's output."""
        return self.scale(self.norm_out(y))

    def added(
        self, x: Float[Tensor, "batch seq dim"], y: Float[Tensor, "batch seq dim"]
    ) -> Float[Tensor, "batch seq dim"]:
        """`x + post(y)`: the residual stream after the branch."""
        y = self.norm_out(y)
        return self.scale(y, x) if isinstance(self.scale, LayerScale) else x + y


class Layer(nn.Module):
    """The layer's own parameters; its attention and feed-forward belong to the stack, which may share them."""

    def __init__(self, config: StackConfig, layout: TokenLayout, layer: int) -> None:
        super().__init__()
        self.attn = Branch(config, layout, layer)
        self.ff = Branch(config, layout, layer)
