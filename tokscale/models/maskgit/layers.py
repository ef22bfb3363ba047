"""The layers of MaskGIT: cosine attention with a learned null entry, and gated feed-forwards with a norm inside."""

from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

from tokscale.base.protocols import ParameterAccess, current
from tokscale.base.shapes import Bool, Float, Int, Shaped, Tensor
from tokscale.models.maskgit.config import BlocksConfig
from tokscale.models.maskgit.operations import AlignedLinear, scaled_unit, unit
from tokscale.nn.attention.observed import ObservedAttention
from tokscale.nn.attention.sdpa import fused_attention
from tokscale.nn.conditioning import Context
from tokscale.nn.feedforward import recomputed
from tokscale.nn.gated import GatedNorm


class Memory(NamedTuple):
    """Keys and values of a context for one layer, the null entry first.

    They may be for the first rows of a batch only: the other rows see nothing but the null entry.
    """

    keys: Float[Tensor, "rows heads keys dim_head"]
    values: Float[Tensor, "rows heads keys dim_head"]
    mask: Bool[Tensor, "rows keys"] | None


def norm(dim: int) -> nn.LayerNorm:
    """A norm with a learned gain and no offset: no buffer that a cast of the parameters would leave behind."""
    return nn.LayerNorm(dim, bias=False)


class Attention(ObservedAttention):
    """Attention whose logits are cosines of queries and keys, times learned scales and a fixed one.

    A learned null key and value stand before all others, so that a query whose context is hidden still has something to
    see (the embeddings of "told nothing").

    Args:
        config: Sizes.
        cross_attend: Whether keys come from a context; else from the input itself.
    """

    def __init__(self, config: BlocksConfig, *, cross_attend: bool = False):
        super().__init__()
        self.config, self.cross_attend = config, cross_attend
        inner = config.heads * config.dim_head
        self.norm = norm(config.dim)
        self.null_kv = nn.Parameter(torch.randn(2, config.heads, config.dim_head))
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_kv = nn.Linear(config.dim, 2 * inner, bias=False)
        self.q_scale = nn.Parameter(torch.ones(config.dim_head))
        self.k_scale = nn.Parameter(torch.ones(config.dim_head))
        self.to_out = nn.Linear(inner, config.dim, bias=False)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: Context | Memory | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        """What each position finds; the residual is the caller's.

        Args:
            x: The input.
            context: With `cross_attend`: what to attend to, or `memory` of it.
        """
        x = self.norm(x)
        if isinstance(context, Memory):
            memory = context
        else:
            source = x if context is None else context.states
            memory = self.memory(Context(source, cast(Tensor, None if context is None else context.mask)))
        rows = len(memory.keys)
        found = rearrange(self.attend(self._heads(self.to_q(x[:rows])), memory), "b h n d -> b n (h d)")
        if not self.cross_attend:
            return self.to_out(found)
        # One call of the projection whatever the rows: a second one would be a collective of its own under ZeRO-3, on
        # those ranks only whose samples need it.
        null = rearrange(self.null_kv[1], "h d -> 1 (h d)").to(found.dtype)
        projected = self.to_out(torch.cat([rearrange(found, "b n d -> (b n) d"), null]))
        found = rearrange(projected[:-1], "(b n) d -> b n d", b=rows)
        return torch.cat([found, projected[-1].expand(len(x) - rows, x.shape[1], -1)]) if rows < len(x) else found

    def memory(self, context: Context) -> Memory:
        """Keys and values of a context, for as many calls as there are."""
        keys, values = self.to_kv(context.states).chunk(2, dim=-1)
        # In the type of the others: autocast leaves a parameter alone, and one fp32 entry makes all of them fp32.
        null_key, null_value = (repeat(t, "h d -> b h 1 d", b=len(keys)) for t in self.null_kv.to(keys.dtype))
        mask = context.mask if context.mask is None else F.pad(context.mask, (1, 0), value=True)
        return Memory(
            unit(torch.cat([null_key, self._heads(keys)], dim=2)),
            torch.cat([null_value, self._heads(values)], dim=2),
            mask,
        )

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.config.heads)

    def attend(
        self, q: Float[Tensor, "batch heads seq dim_head"], memory: Memory
    ) -> Float[Tensor, "batch heads seq dim_head"]:
        """Attention proper, of queries before their scales, to as many samples as the memory has."""
        # Both scales go into the queries: they multiply the same products, and queries are the fewer.
        q = scaled_unit(q, self.q_scale, self.k_scale)
        keys, values, _ = memory
        mask = None if memory.mask is None else rearrange(memory.mask, "b n -> b 1 1 n")
        dropout = self.config.dropout if self.training else 0.0
        if self.config.flash:
            return fused_attention(q, keys, values, mask, dropout=dropout, scale=self.config.scale)
        return dense_attention(q, keys, values, mask, scale=self.config.scale, dropout=dropout)

    def weights(
        self, sample: int, q: Float[Tensor, "batch heads seq dim_head"], memory: Memory
    ) -> Float[Tensor, "heads seq keys"]:
        """See `ObservedAttention`; the null key is the first."""
        one = slice(sample, sample + 1)
        mask = None if memory.mask is None else rearrange(memory.mask[one], "b n -> b 1 1 n")
        q = scaled_unit(q[one].float(), self.q_scale.float(), self.k_scale.float())
        return dense_weights(q, memory.keys[one].float(), mask, scale=self.config.scale)[0]


def may_select(x: Shaped[Tensor, "..."]) -> bool:
    """Whether to leave out rows whose number follows from the batch.

    A CPU knows the number and saves the work. On a GPU the host would wait for it, with nothing queued, in every pass,
    and no shape would be known beforehand: there all rows are computed, and those that were not wanted count nothing.
    """
    return x.device.type != "cuda"


def _told_first(x: Tensor, context: Context) -> tuple[Tensor, Context, Tensor | None]:
    """The same samples with those first that are told something, and a context of these alone.

    What the others see of a context is its null entry, which needs no queries: half of the work of cross-attention
    where half of the texts are dropped.
    """
    if not may_select(x):
        return x, context, None
    seen = context.mask.any(dim=1)
    count = max(int(seen.sum()), 1)
    if count == len(x):
        return x, context, None
    order = seen.argsort(descending=True, stable=True)
    first = order[:count]
    return x[order], Context(context.states[first], context.mask[first]), order


def _rows(places: Tensor, order: Tensor | None) -> Tensor:
    """Places in order, as numbers of rows of the flat batch, whose samples may stand in another order."""
    samples, columns = places.nonzero(as_tuple=True)
    return (samples if order is None else order.argsort()[samples]) * places.shape[1] + columns


def dense_attention(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch heads keys dim_head"],
    v: Float[Tensor, "batch heads keys dim_head"],
    mask: Bool[Tensor, "batch 1 1 keys"] | None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads seq dim_head"]:
    """The oracle of fused attention: every probability is computed."""
    return torch.einsum("bhij,bhjd->bhid", F.dropout(dense_weights(q, k, mask, scale=scale), dropout), v)


def dense_weights(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch heads keys dim_head"],
    mask: Bool[Tensor, "batch 1 1 keys"] | None,
    *,
    scale: float,
) -> Float[Tensor, "batch heads seq keys"]:
    """How much each query takes of each key."""
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.finfo(logits.dtype).max)
    return logits.softmax(dim=-1)


class FeedForward(nn.Module):
    """GEGLU with a norm on its hidden layer (NormFormer, arXiv:2110.09456)."""

    def __init__(self, dim: int, mult: float = 4):
        super().__init__()
        hidden = int(dim * mult * 2 / 3)
        self.norm = norm(dim)
        self.to_hidden = AlignedLinear(dim, 2 * hidden)
        self.hidden_norm = GatedNorm(hidden)
        self.to_out = AlignedLinear(hidden, dim)

    def forward(self, x: Float[Tensor, "*places dim"]) -> Float[Tensor, "*places dim"]:
        """Each position by itself."""
        return recomputed(self._leave, recomputed(self._enter, x))

    def _enter(self, x: Tensor) -> Tensor:
        return self.to_hidden(self.norm(x))

    def _leave(self, hidden: Tensor) -> Tensor:
        return self.to_out(self.hidden_norm(hidden))


class Layer(nn.Module):
    """Self-attention, attention to a context where there is one, feed-forward, each added to its input."""

    def __init__(self, config: BlocksConfig, *, cross_attend: bool):
        super().__init__()
        self.attn = Attention(config)
        self.cross_attn = Attention(config, cross_attend=True) if cross_attend else None
        self.ff = FeedForward(config.dim, config.ff_mult)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        context: Context | Memory | None,
        rows: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "*places dim"]:
        """One layer.

        Args:
            x: Its input.
            context: What it attends to beside that.
            rows: The places whose output is wanted, counted through the batch; all when left out.
        """
        x = x + self.attn(x)
        if self.cross_attn is not None:
            x = x + self.cross_attn(x, context)
        if rows is not None:
            x = rearrange(x, "b n d -> (b n) d")[rows]
        return x + self.ff(x)


class TransformerBlocks(nn.Module):
    """Layers and a final norm. Every position sees every other.

    Args:
        config: Sizes.
        cross_attend: Whether layers attend to a context.
    """

    def __init__(self, config: BlocksConfig, *, cross_attend: bool = True):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config, cross_attend=cross_attend) for _ in range(config.depth))
        self.norm = norm(config.dim)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        context: Context | list[Memory] | None = None,
        places: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "*places dim"]:
        """Run the layers.

        Args:
            x: Embedded codes.
            context: What layers attend to, or `memories` of it.
            places: Where output is wanted, which comes as one row for each, in order; everywhere when left out. The
                last feed-forward then has fewer rows.
        """
        order = None
        if isinstance(context, Context):
            x, context, order = _told_first(x, context)
        rows = None if places is None else _rows(places, order)
        for index, layer in enumerate(self.layers):
            told = context[index] if isinstance(context, list) else context
            wanted = rows if index + 1 == len(self.layers) else None
            if self.config.remat == "block" and torch.is_grad_enabled():
                run = partial(layer, context=told, rows=wanted)
                draws = self.training and self.config.dropout > 0
                x = checkpoint(run, x, use_reentrant=False, preserve_rng_state=draws)
            else:
                x = layer(x, told, wanted)
        x = self.norm(x)
        return x if order is None or rows is not None else x[order.argsort()]

    def memories(self, context: Context) -> list[Memory]:
        """Keys and values of a context for every layer, computed once for many looks at the image."""
        found = []
        for layer in self.layers:
            attention = cast(Attention, cast(Layer, layer).cross_attn)
            with current(ParameterAccess).gathered([attention.null_kv]):  # read outside of its module's own call
                found.append(attention.memory(context))
        return found

    def forward_flops(self, length: int, context: int = 0, wanted: float = 1.0) -> float:
        """Floating-point operations of one forward pass over one sample: matrix products, a multiply-add is two.

        Args:
            length: Positions.
            context: States that they attend to.
            wanted: Share of the positions whose output is wanted.
        """
        config = self.config
        inner, hidden = config.heads * config.dim_head, int(config.dim * config.ff_mult * 2 / 3)
        own = 2 * length * config.dim * (4 * inner + 3 * hidden) + 4 * inner * length * (length + 1)
        told = 2 * config.dim * inner * (2 * length + 2 * context) + 4 * inner * length * (context + 1)
        unwanted = (1 - wanted) * 2 * length * config.dim * 3 * hidden
        return float(config.depth * (own + (told if context else 0)) - unwanted)
