"""The transformer stack: layers over one token layout, run plainly, checkpointed, reversibly or incrementally."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, assert_never, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tokscale.base.errors import ConfigError
from tokscale.base.shapes import Bool, Float, Tensor
from tokscale.nn.attention.decode import DeviceStep, KeyValueCache
from tokscale.nn.attention.module import Attention
from tokscale.nn.attention.pattern import KINDS, AttentionPattern
from tokscale.nn.block import Branch, Layer
from tokscale.nn.cache import Cache, empty_history
from tokscale.nn.config import Backend, StackConfig
from tokscale.nn.feedforward import FeedForward
from tokscale.nn.layout import TokenLayout
from tokscale.nn.reversible import ResidualBranch, residual_stream, run_reversible
from tokscale.nn.rotary import rotary_table
from tokscale.nn.shift import history_length


class Stack(nn.Module):
    """`depth` layers of attention and feed-forward, without embeddings, positions other than rotary, or a final norm.

    Args:
        config: Sizes and options.
        layout: What each position is. Sequences may be shorter than it.
        causal: Whether a position sees only itself and those before it.
        others: Further layouts that sequences may have, of images of other shapes; checked here, too.

    Raises:
        ConfigError: When an attention kind does not fit the layout or the direction; before any weight is made.
    """

    def __init__(
        self, config: StackConfig, layout: TokenLayout, *, causal: bool = True, others: Sequence[TokenLayout] = ()
    ) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self.causal = causal
        patterns = _patterns(config, layout, causal)
        for other in others:
            _patterns(config, other, causal)
        # Shared functions are registered once, here; a layer knows which one it uses by index.
        self.attentions = nn.ModuleList(Attention(config, pattern) for pattern in patterns.values())
        ff_ids = dict.fromkeys(config.ff_ids())
        self.feedforwards = nn.ModuleList(
            FeedForward(config.dim, config.ff_mult, config.ff_dropout, gated=config.ff_glu) for _ in ff_ids
        )
        self.layers = nn.ModuleList(Layer(config, layout, layer + 1) for layer in range(config.depth))
        self._attn_of = [list(patterns).index(identity) for identity in config.attn_ids()]
        self._ff_of = [list(ff_ids).index(identity) for identity in config.ff_ids()]

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        *,
        key_mask: Bool[Tensor, "batch keys"] | None = None,
        cache: Cache | None = None,
        step: DeviceStep | None = None,
        layout: TokenLayout | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Run the stack over positions `[0, seq)`, or with a cache over `[offset, offset + seq)`.

        Args:
            x: Embedded tokens, at most `layout.seq` of them.
            key_mask: True where a key may be seen, for all positions so far (with a cache, the cached ones too). A
                query that sees no key at all gets zeros from attention.
            cache: Appended to; the result is then that of the new positions alone, and carries no gradient.
            step: With a cache: `x` is the one position that this says, in place of the cache's next one.
            layout: The sequence's, where it is not the stack's own; with a cache, that of the cache.

        Raises:
            ConfigError: When the sequence is longer than the layout, or the cache is for another batch.
        """
        layout = cache.layout if cache is not None else layout or self.layout
        offset = cache.offset if cache is not None else 0
        if offset + x.shape[1] > layout.seq:
            raise ConfigError(
                f"a sequence of {offset + x.shape[1]} positions does not fit the layout of {layout.seq} "
                f"({layout.text} text, {layout.grid_h}x{layout.grid_w} image)"
            )
        rotary = None
        if self.config.rotary_emb:
            table = rotary_table(layout, self.config.dim_head, x.device, self.config.rotary_dtype)
            rotary = table[offset : offset + x.shape[1]] if step is None else table.index_select(0, step.position)
        if cache is not None:
            return self._incremental(x, rotary, key_mask, cache, step)
        if self.config.reversible:
            return run_reversible(x, self.branches(rotary, key_mask, layout))
        for own, attention, feedforward in self._functions():
            x = self._layer(own, attention, feedforward, x, _Seen(rotary, key_mask, layout))
        return x

    def new_cache(
        self, batch: int, *, device: torch.device | str, dtype: torch.dtype, layout: TokenLayout | None = None
    ) -> Cache:
        """An empty cache for `batch` samples; `dtype` is that of the activations, `layout` that of the sequences.

        Raises:
            ConfigError: When the stack is bidirectional.
        """
        if not self.causal:
            raise ConfigError("a bidirectional stack cannot decode step by step, so it has no cache")
        device, layout = torch.device(device), layout or self.layout
        reach, half = history_length(layout), self.config.dim // 2
        histories = [
            [
                empty_history(batch, reach, half, device, dtype) if self.config.shift_tokens else None
                for _ in self.layers
            ]
            for _ in range(2)
        ]
        attn = [
            KeyValueCache(attention.pattern.over(layout), batch, self.config.dim_head, device=device, dtype=dtype)
            for _, attention, _ in self._functions()
        ]
        return Cache(attn, histories[0], histories[1], batch, layout)

    def backends(
        self, device: torch.device | str, dtype: torch.dtype, *, grad: bool = True, length: int | None = None
    ) -> dict[str, Backend]:
        """By attention kind, how unpadded sequences of `length` positions are computed; for the run's records."""
        length = length or self.layout.seq
        return {
            attention.pattern.kind: attention.backend_for(
                torch.device(device), dtype, grad=grad, length=length, masked=False
            )
            for _, attention, _ in self._functions()
        }

    def forward_flops(self, length: int | None = None, layout: TokenLayout | None = None) -> float:
        """Floating-point operations of one forward pass over one sample: matrix products, a multiply-add is two."""
        layout = layout or self.layout
        config, length = self.config, length or layout.seq
        inner, hidden = config.heads * config.dim_head, int(config.dim * config.ff_mult)
        projections = 2 * length * config.dim * (4 * inner + (3 if config.ff_glu else 2) * hidden) * config.depth
        cells = sum(attention.pattern.over(layout).pairs(length) for _, attention, _ in self._functions())
        return float(projections + 4 * inner * cells)

    def branches(
        self, rotary: Tensor | None, key_mask: Tensor | None, layout: TokenLayout | None = None
    ) -> list[ResidualBranch]:
        """The residual updates in order, as the reversible stack runs them."""
        branches, seen = [], _Seen(rotary, key_mask, layout or self.layout)
        for layer, (own, attention, feedforward) in enumerate(self._functions()):
            branches.append(
                ResidualBranch(
                    partial(_attend, own.attn, attention, seen=seen),
                    *_sharing(attention, self._attn_of, layer),
                    stochastic=self.training and self.config.attn_dropout > 0,
                )
            )
            branches.append(
                ResidualBranch(
                    partial(_feed, own.ff, feedforward, layout=seen.layout),
                    *_sharing(feedforward, self._ff_of, layer),
                    stochastic=self.training and self.config.ff_dropout > 0,
                )
            )
        return branches

    def _functions(self) -> list[tuple[Layer, Attention, FeedForward]]:
        """Each layer with the functions it uses."""
        return [
            (cast(Layer, own), cast(Attention, self.attentions[attn]), cast(FeedForward, self.feedforwards[ff]))
            for own, attn, ff in zip(self.layers, self._attn_of, self._ff_of, strict=True)
        ]

    def _layer(
        self,
        own: Layer,
        attention: Attention,
        feedforward: FeedForward,
        x: Tensor,
        seen: "_Seen",
    ) -> Tensor:
        # Modules travel as arguments: a closure over a loop variable would recompute with the last layer's.
        draws = self.training and max(self.config.attn_dropout, self.config.ff_dropout) > 0
        run = partial(checkpoint, use_reentrant=False, preserve_rng_state=draws)
        remat = self.config.remat if torch.is_grad_enabled() else "none"
        match remat:
            case "none":
                return _full_layer(own, attention, feedforward, x, seen)
            case "block":
                return run(_full_layer, own, attention, feedforward, x, seen)
            case "regions":
                q, k, v = run(_pre_attention, own, attention, x, seen)
                mixed = attention.attend(q, k, v, seen.key_mask, layout=seen.layout)
                return run(_post_attention, own, attention, feedforward, x, mixed, seen.layout)
            case _:
                assert_never(remat)

    @torch.no_grad()
    def _incremental(
        self, x: Tensor, rotary: Tensor | None, key_mask: Tensor | None, cache: Cache, step: DeviceStep | None
    ) -> Tensor:
        cache.check(*x.shape[:2])
        offset = cache.offset if step is None else step
        place: dict[str, Any] = {"offset": offset, "layout": cache.layout}
        reversible = self.config.reversible
        first = second = residual_stream(x) if reversible else x
        for layer, (own, attention, feedforward) in enumerate(self._functions()):
            normed = own.attn.pre(second.to(x.dtype), history=cache.attn_history[layer], **place)
            mixed = attention(normed, rotary, key_mask, offset=offset, cache=cache.attn[layer])
            first = own.attn.added(first, mixed)
            second = second if reversible else first
            normed = own.ff.pre(first.to(x.dtype), history=cache.ff_history[layer], **place)
            second = own.ff.added(second, feedforward(normed))
            first = first if reversible else second
        cache.offset += x.shape[1] if step is None else 0
        return ((first + second) / 2).to(x.dtype) if reversible else first


def _patterns(config: StackConfig, layout: TokenLayout, causal: bool) -> dict[int | str, AttentionPattern]:
    """One pattern for each distinct attention function, in order of first use."""
    patterns: dict[int | str, AttentionPattern] = {}
    for identity, kind in zip(config.attn_ids(), config.layer_types(), strict=True):
        if identity not in patterns:
            patterns[identity] = AttentionPattern(
                kind=kind,
                layout=layout,
                causal=causal,
                heads=config.heads,
                kernel_size=config.kernel_size,
                dilation=config.dilation,
                conv_window=config.conv_window,
                sparse=config.sparse,
                stream=len(patterns) if KINDS[kind].is_random else 0,
            )
    return patterns


def _sharing(function: nn.Module, users: list[int], layer: int) -> tuple[tuple[nn.Parameter, ...], bool]:
    """The parameters that other layers use too, and whether this layer comes last in backward order."""
    others = [other for other, index in enumerate(users) if index == users[layer]]
    return (tuple(function.parameters()) if len(others) > 1 else ()), layer == others[0]


class _Seen(NamedTuple):
    """What all layers are told beside the sequence; an argument, so that recomputing sees the same."""

    rotary: Tensor | None
    key_mask: Tensor | None
    layout: TokenLayout


def _attend(branch: Branch, attention: Attention, x: Tensor, *, seen: _Seen) -> Tensor:
    return branch.post(_mixed(branch, attention, x, seen))


def _feed(branch: Branch, feedforward: FeedForward, x: Tensor, *, layout: TokenLayout) -> Tensor:
    return branch.post(feedforward(branch.pre(x, layout=layout)))


def _mixed(branch: Branch, attention: Attention, x: Tensor, seen: _Seen) -> Tensor:
    return attention(branch.pre(x, layout=seen.layout), seen.rotary, seen.key_mask, layout=seen.layout)


def _full_layer(own: Layer, attention: Attention, feedforward: FeedForward, x: Tensor, seen: _Seen) -> Tensor:
    x = own.attn.added(x, _mixed(own.attn, attention, x, seen))
    return own.ff.added(x, feedforward(own.ff.pre(x, layout=seen.layout)))


def _pre_attention(own: Layer, attention: Attention, x: Tensor, seen: _Seen) -> tuple[Tensor, Tensor, Tensor]:
    return attention.qkv(own.attn.pre(x, layout=seen.layout), seen.rotary)


def _post_attention(
    own: Layer, attention: Attention, feedforward: FeedForward, x: Tensor, mixed: Tensor, layout: TokenLayout
) -> Tensor:
    x = own.attn.added(x, attention.project(mixed))
    return own.ff.added(x, feedforward(own.ff.pre(x, layout=layout)))
