"""The decoder: layers of self-attention, attention to the caption and feed-forward, whole or position by position."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tokscale.base.shapes import Float, Tensor
from tokscale.models.grids import Grid
from tokscale.models.parti.attention import CrossAttention, PatternSelfAttention, RelativeSelfAttention
from tokscale.models.parti.config import PartiConfig
from tokscale.nn.attention.decode import DeviceStep
from tokscale.nn.attention.pattern import AttentionPattern
from tokscale.nn.conditioning import Context
from tokscale.nn.feedforward import recomputed
from tokscale.nn.gated import GeluNorm
from tokscale.nn.layout import TokenLayout


class FeedForward(nn.Module):
    """Norm, a hidden layer with GELU, a norm inside it if asked for, and back; no biases."""

    def __init__(self, config: PartiConfig):
        super().__init__()
        hidden = int(config.dim * config.ff_mult)
        self.norm = nn.LayerNorm(config.dim, bias=False)
        self.to_hidden = nn.Linear(config.dim, hidden, bias=False)
        self.inner_norm = GeluNorm(hidden) if config.ff_norm else nn.GELU()
        self.dropout = nn.Dropout(config.dropout)
        self.to_out = nn.Linear(hidden, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        """Each position by itself."""
        draws = self.training and self.dropout.p > 0
        return recomputed(self._leave, recomputed(self._enter, x), draws=draws)

    def _enter(self, x: Tensor) -> Tensor:
        return self.to_hidden(self.norm(x))

    def _leave(self, hidden: Tensor) -> Tensor:
        return self.to_out(self.dropout(self.inner_norm(hidden)))


class Layer(nn.Module):
    """One decoder layer; each branch begins with a norm of its own."""

    def __init__(self, config: PartiConfig, grid: Grid, width: int, number: int):
        super().__init__()
        if config.rel_pos_bias:
            self.self_attn = RelativeSelfAttention(config, grid)
        else:
            pattern = AttentionPattern(
                kind=config.attn_types[number % len(config.attn_types)],
                layout=TokenLayout(1, *grid),
                heads=config.heads,
                kernel_size=config.kernel_size,
                conv_window=config.conv_window,
            )
            for other in config.image_grids:
                pattern.over(TokenLayout(1, *other))  # refused here, if at all
            self.self_attn = PatternSelfAttention(config, pattern)
        self.cross_attn = CrossAttention(config, width)
        self.ff = FeedForward(config)
        norms = (nn.LayerNorm(config.dim, bias=False) if config.sandwich_norm else nn.Identity() for _ in range(3))
        self.norms_out = nn.ModuleList(norms)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], states: Tensor, mask: Tensor, grid: Grid
    ) -> Float[Tensor, "batch seq dim"]:
        """Positions `0 ... seq - 1` of images of a grid, with the caption's `states` and `mask`."""
        self_out, cross_out, ff_out = self.norms_out
        x = x + self_out(self.self_attn(x, grid))
        x = x + cross_out(self.cross_attn(x, states, mask))
        return x + ff_out(self.ff(x))

    def forward_flops(self, positions: int, words: int, grid: Grid) -> float:
        """Floating-point operations of one sample's forward pass."""
        attn, cross = self.self_attn, self.cross_attn
        weights = (attn.to_q, attn.to_kv, attn.to_out, cross.to_q, cross.to_out, self.ff.to_hidden, self.ff.to_out)
        products = sum(positions * weight.weight.numel() for weight in weights) + words * cross.to_kv.weight.numel()
        cells = attn.cells(positions, grid) + positions * (words + 1)
        return 2.0 * (products + 2 * attn.to_q.out_features * cells)

    def remember(self, context: Context, dtype: torch.dtype, grid: Grid) -> "LayerMemory":
        """Empty room for the codes, and the caption's keys and values, computed once."""
        states, mask = context
        return LayerMemory(
            self.self_attn.new_cache(len(states), states.device, dtype, grid), self.cross_attn.memory(states), mask
        )

    def step(self, x: Float[Tensor, "batch 1 dim"], position: int | DeviceStep, memory: "LayerMemory") -> Tensor:
        """The next position alone."""
        self_out, cross_out, ff_out = self.norms_out
        x = x + self_out(self.self_attn.step(x, position, memory.codes))
        x = x + cross_out(self.cross_attn.read(x, *memory.caption, memory.mask))
        return x + ff_out(self.ff(x))


@dataclass
class LayerMemory:
    """What a layer keeps while codes are drawn."""

    codes: Any
    """A `KeyBuffer` or a `KeyValueCache`: whichever its self-attention made."""
    caption: tuple[Tensor, Tensor]
    """Keys and values."""
    mask: Tensor
    """Of the caption."""


class CodeDecoder(nn.Module):
    """`depth` layers and a final norm. Sequences may be shorter than `[start, whole image]`.

    Args:
        config: Options.
        grid: Rows and columns of codes; of several grids, the most of each.
        width: Of the caption's states.
    """

    def __init__(self, config: PartiConfig, grid: Grid, width: int):
        super().__init__()
        self.grid = grid
        self.remat, self.dropout = config.remat, config.dropout
        self.layers = nn.ModuleList(Layer(config, grid, width, number) for number in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, bias=False)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: Context, grid: Grid | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        """Hidden states of every position, normalised for the head; `grid` where it is not the largest."""
        (states, mask), grid = context, grid or self.grid
        for layer in self.layers:
            if self.remat == "block" and torch.is_grad_enabled():
                draws = self.training and self.dropout > 0
                x = checkpoint(layer, x, states, mask, grid, use_reentrant=False, preserve_rng_state=draws)
            else:
                x = layer(x, states, mask, grid)
        return self.norm(x)

    def remember(self, context: Context, dtype: torch.dtype, grid: Grid | None = None) -> list[LayerMemory]:
        """What the layers need to draw codes for a batch of captions; shapes never change."""
        return [cast(Layer, layer).remember(context, dtype, grid or self.grid) for layer in self.layers]

    @torch.no_grad()
    def step(
        self, x: Float[Tensor, "batch 1 dim"], position: int | DeviceStep, memory: list[LayerMemory]
    ) -> Float[Tensor, "batch 1 dim"]:
        """The hidden state of the next position; positions come one by one, from 0 on.

        A `DeviceStep` says one that only the device knows, after position 0.
        """
        for layer, kept in zip(self.layers, memory, strict=True):
            x = cast(Layer, layer).step(x, position, kept)
        return self.norm(x)

    def forward_flops(self, positions: int, words: int, grid: Grid | None = None) -> float:
        """Floating-point operations of one sample's forward pass: matrix products, a multiply-add is two.

        Args:
            positions: Of the sequence.
            words: States of the caption.
            grid: Where it is not the largest.
        """
        return sum(cast(Layer, layer).forward_flops(positions, words, grid or self.grid) for layer in self.layers)
