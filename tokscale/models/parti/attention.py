"""The decoder's attention: to the codes before, and to the caption."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.models.grids import Grid
from tokscale.models.parti.config import PartiConfig
from tokscale.nn.attention.backend import attend, choose_backend
from tokscale.nn.attention.decode import DeviceStep, KeyValueCache
from tokscale.nn.attention.observed import ObservedAttention
from tokscale.nn.attention.pattern import AttentionPattern
from tokscale.nn.attention.reference import attention_weights
from tokscale.nn.attention.relative import Places, bias_row, bias_row_at, dense_relative_weights
from tokscale.nn.attention.relative_flex import biased_attention
from tokscale.nn.attention.sdpa import fused_attention
from tokscale.nn.feedforward import recomputed
from tokscale.nn.layout import TokenLayout


class Projections(nn.Module):
    """Norm and projections around one attention: queries of all heads, keys and values of one or of all.

    Args:
        config: Options.
        source: Width of what keys and values are made from.
        null: Whether a learned key and value stand before all others, so that there is always something to see.
    """

    def __init__(self, config: PartiConfig, source: int, *, null: bool):
        super().__init__()
        self.dim_head, self.dropout = config.dim_head, nn.Dropout(config.dropout)
        self.tensors = 1 if config.kv_tied else 2
        kv_heads = 1 if config.multi_query else config.heads
        self.kv_width = self.tensors * kv_heads * config.dim_head
        # Without the bias that `nn.LayerNorm` has: the original's is a constant zero, and a buffer at that, which an
        # engine that casts parameters alone leaves in single precision.
        self.norm = nn.LayerNorm(config.dim, bias=False)
        self.to_q = nn.Linear(config.dim, config.heads * config.dim_head, bias=False)
        self.to_kv = nn.Linear(source, self.kv_width, bias=False)
        self.to_out = nn.Linear(config.heads * config.dim_head, config.dim, bias=False)
        self.null_kv = nn.Parameter(torch.randn(self.kv_width)) if null else None

    def queries(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch heads seq dim_head"]:
        """From the normalised stream."""
        return rearrange(self.to_q(self.dropout(x)), "b n (h d) -> b h n d", d=self.dim_head)

    def keys_and_values(
        self, source: Float[Tensor, "batch keys width"], *, null: bool
    ) -> tuple[Float[Tensor, "batch kv_heads some dim_head"], Float[Tensor, "batch kv_heads some dim_head"]]:
        """Of a sequence, after the null ones if asked for."""
        made = self.to_kv(self.dropout(source))
        if null:
            assert self.null_kv is not None
            # In the type of the others: autocast leaves a parameter alone, and one fp32 entry makes all of them fp32.
            made = torch.cat([repeat(self.null_kv.to(made.dtype), "w -> b 1 w", b=len(made)), made], dim=1)
        k, *v = rearrange(made, "b n (t h d) -> t b h n d", t=self.tensors, d=self.dim_head)
        return k, v[0] if v else k

    def project(self, mixed: Float[Tensor, "batch heads seq dim_head"]) -> Float[Tensor, "batch seq dim"]:
        """Heads back to the residual width."""
        return self.to_out(rearrange(mixed, "b h n d -> b n (h d)"))


@dataclass
class KeyBuffer:
    """Static buffers of keys and values that fill from the front."""

    keys: Float[Tensor, "batch kv_heads total dim_head"]
    values: Float[Tensor, "batch kv_heads total dim_head"]
    grid: Grid
    """Of the images that are drawn."""
    filled: int = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add what was made of the next positions."""
        stop = self.filled + k.shape[2]
        self.keys[:, :, self.filled : stop] = k
        if self.values is not self.keys:
            self.values[:, :, self.filled : stop] = v
        self.filled = stop

    def put(self, k: Tensor, v: Tensor, slot: Int[Tensor, "1"]) -> None:
        """Write what was made of one position where the device says."""
        self.keys.index_copy_(2, slot, k)
        if self.values is not self.keys:
            self.values.index_copy_(2, slot, v)

    def seen(self) -> tuple[Tensor, Tensor]:
        """Views of what is filled."""
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]


class OffsetBias(ObservedAttention):
    """Attention under a learned bias for every head and 2-D offset between two codes.

    The table's owner runs the whole attention, because an engine that shards parameters makes the table whole only
    while its owner runs.
    """

    no_decay = True
    named_as_owner = True

    def __init__(self, heads: int, places: Places):
        super().__init__()
        self.places = places
        self.table = nn.Parameter(torch.randn(places.rows, heads) * 0.02)

    def forward(
        self,
        q: Float[Tensor, "batch heads seq dim_head"],
        k: Float[Tensor, "batch kv_heads keys dim_head"],
        v: Float[Tensor, "batch kv_heads keys dim_head"],
        grid: Grid,
    ) -> Float[Tensor, "batch heads seq dim_head"]:
        """Causal attention of positions `0 ... seq - 1`; the null key stands before theirs."""
        return self.attend(q, k, v, grid)

    def attend(
        self,
        q: Float[Tensor, "batch heads seq dim_head"],
        k: Float[Tensor, "batch kv_heads keys dim_head"],
        v: Float[Tensor, "batch kv_heads keys dim_head"],
        grid: Grid,
    ) -> Float[Tensor, "batch heads seq dim_head"]:
        """See `forward`, inside of which alone the table is whole."""
        return biased_attention(q, k, v, self.table, self.places.over(grid))

    def weights(
        self,
        sample: int,
        q: Float[Tensor, "batch heads seq dim_head"],
        k: Float[Tensor, "batch kv_heads keys dim_head"],
        v: Float[Tensor, "batch kv_heads keys dim_head"],
        grid: Grid,
    ) -> Float[Tensor, "heads seq keys"]:
        """See `ObservedAttention`; the null key is the first."""
        del v
        one = slice(sample, sample + 1)
        places = self.places.over(grid)
        return dense_relative_weights(q[one].float(), k[one].float(), self.table.float(), places)[0]

    def step(
        self,
        q: Float[Tensor, "batch heads 1 dim_head"],
        k: Float[Tensor, "batch kv_heads keys dim_head"],
        v: Float[Tensor, "batch kv_heads keys dim_head"],
        grid: Grid,
    ) -> Float[Tensor, "batch heads 1 dim_head"]:
        """The last position alone, to the null key and all positions so far."""
        return shared_attention(q, k, v, bias_row(self.table, self.places.over(grid), k.shape[2] - 2).to(q.dtype))

    def device_step(
        self,
        q: Float[Tensor, "batch heads 1 dim_head"],
        k: Float[Tensor, "batch kv_heads keys dim_head"],
        v: Float[Tensor, "batch kv_heads keys dim_head"],
        grid: Grid,
        step: DeviceStep,
    ) -> Float[Tensor, "batch heads 1 dim_head"]:
        """One position that the device knows, to the null key and those of all positions up to it."""
        bias = bias_row_at(self.table, self.places.over(grid), step, k.shape[2] - 1)
        return shared_attention(q, k, v, bias.to(q.dtype))


class RelativeSelfAttention(Projections):
    """The original's: a null key, and a bias for every 2-D offset between two codes."""

    def __init__(self, config: PartiConfig, grid: Grid):
        super().__init__(config, config.dim, null=True)
        self.bias = OffsetBias(config.heads, Places(*grid, config.rel_pos_index))

    def forward(self, x: Float[Tensor, "batch seq dim"], grid: Grid) -> Float[Tensor, "batch seq dim"]:
        """Positions `0 ... seq - 1`."""
        x = self.norm(x)
        return self.project(self.bias(self.queries(x), *self.keys_and_values(x, null=True), grid))

    def cells(self, positions: int, grid: Grid) -> int:
        """Pairs of a query and a key that are computed."""
        del grid
        return positions * (positions + 3) // 2

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype, grid: Grid) -> KeyBuffer:
        """Empty buffers for the null key and every position that has a code to follow it."""
        heads, total = self.kv_width // self.tensors // self.dim_head, grid[0] * grid[1] + 1
        keys = torch.zeros(batch, heads, total, self.dim_head, device=device, dtype=dtype)
        return KeyBuffer(keys, torch.zeros_like(keys) if self.tensors == 2 else keys, grid)

    def step(
        self, x: Float[Tensor, "batch 1 dim"], position: int | DeviceStep, cache: KeyBuffer
    ) -> Float[Tensor, "batch 1 dim"]:
        """The next position alone, to all so far."""
        x = self.norm(x)
        if isinstance(position, DeviceStep):
            slot = position.once("slot after the null key", lambda: position.position + 1)
            cache.put(*self.keys_and_values(x, null=False), slot)
            stop = min(position.reach + 2, cache.keys.shape[2])  # the null key and the start token beside the codes
            keys, values = cache.keys[:, :, :stop], cache.values[:, :, :stop]
            return self.project(self.bias.device_step(self.queries(x), keys, values, cache.grid, position))
        cache.append(*self.keys_and_values(x, null=position == 0))
        return self.project(self.bias.step(self.queries(x), *cache.seen(), cache.grid))


class PatternSelfAttention(Projections, ObservedAttention):
    """The paper's: which codes are seen is a pattern; places are told apart by the positions of the embeddings."""

    def __init__(self, config: PartiConfig, pattern: AttentionPattern):
        super().__init__(config, config.dim, null=False)
        self.pattern = pattern

    def forward(self, x: Float[Tensor, "batch seq dim"], grid: Grid) -> Float[Tensor, "batch seq dim"]:
        """Positions `0 ... seq - 1`."""
        return self.project(self.attend(*self._split(x), self._over(grid)))

    def attend(
        self,
        q: Float[Tensor, "batch heads seq dim_head"],
        k: Float[Tensor, "batch heads seq dim_head"],
        v: Float[Tensor, "batch heads seq dim_head"],
        pattern: AttentionPattern,
    ) -> Float[Tensor, "batch heads seq dim_head"]:
        """Attention proper, of whole sequences."""
        grad = torch.is_grad_enabled() and q.requires_grad
        backend = choose_backend(pattern, q.device, q.dtype, grad=grad, length=q.shape[2])
        return attend(q, k, v, pattern, None, backend=backend)

    def weights(
        self,
        sample: int,
        q: Float[Tensor, "batch heads seq dim_head"],
        k: Float[Tensor, "batch heads seq dim_head"],
        v: Float[Tensor, "batch heads seq dim_head"],
        pattern: AttentionPattern,
    ) -> Float[Tensor, "heads seq seq"]:
        """See `ObservedAttention`."""
        del v
        one = slice(sample, sample + 1)
        return attention_weights(q[one].float(), k[one].float(), pattern)[0]

    def cells(self, positions: int, grid: Grid) -> int:
        """Pairs of a query and a key that are seen."""
        return self._over(grid).pairs(positions)

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype, grid: Grid) -> KeyValueCache:
        """Empty buffers for what later positions may see."""
        return KeyValueCache(self._over(grid), batch, self.dim_head, device=device, dtype=dtype)

    def step(
        self, x: Float[Tensor, "batch 1 dim"], position: int | DeviceStep, cache: KeyValueCache
    ) -> Float[Tensor, "batch 1 dim"]:
        """The next position alone, to all so far that it sees."""
        q, k, v = self._split(x)
        return self.project(cache.extend(q, k, v, position))

    def _over(self, grid: Grid) -> AttentionPattern:
        return self.pattern.over(TokenLayout(self.pattern.layout.text, *grid))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.norm(x)
        q, (k, v) = self.queries(x), self.keys_and_values(x, null=False)
        return q, k.expand_as(q), v.expand_as(q)


class CrossAttention(Projections, ObservedAttention):
    """To the caption's states, which are neither projected nor normalised here, or else to the null key alone."""

    def __init__(self, config: PartiConfig, width: int):
        super().__init__(config, width, null=True)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        states: Float[Tensor, "batch words width"],
        mask: Bool[Tensor, "batch words"],
    ) -> Float[Tensor, "batch seq dim"]:
        """From every position to the states that may be seen."""
        return self.read(x, *self.memory(states), mask)

    def memory(
        self, states: Float[Tensor, "batch words width"]
    ) -> tuple[Float[Tensor, "batch kv_heads some dim_head"], Float[Tensor, "batch kv_heads some dim_head"]]:
        """Keys and values of the caption: all that `read` needs of it, the same for every position."""
        return self.keys_and_values(states.to(self.to_kv.weight.dtype), null=True)

    def read(
        self,
        x: Float[Tensor, "batch seq dim"],
        k: Float[Tensor, "batch kv_heads some dim_head"],
        v: Float[Tensor, "batch kv_heads some dim_head"],
        mask: Bool[Tensor, "batch words"],
    ) -> Float[Tensor, "batch seq dim"]:
        """From every position to the keys of `memory`."""
        seen = rearrange(F.pad(mask, (1, 0), value=True), "b j -> b 1 1 j")
        draws = self.training and self.dropout.p > 0
        return self.project(self.attend(recomputed(self._asked, x, draws=draws), k, v, seen))

    def attend(
        self,
        q: Float[Tensor, "batch heads seq dim_head"],
        k: Float[Tensor, "batch kv_heads some dim_head"],
        v: Float[Tensor, "batch kv_heads some dim_head"],
        seen: Bool[Tensor, "batch 1 1 some"],
    ) -> Float[Tensor, "batch heads seq dim_head"]:
        """Attention proper."""
        return shared_attention(q, k, v, seen)

    def weights(
        self,
        sample: int,
        q: Float[Tensor, "batch heads seq dim_head"],
        k: Float[Tensor, "batch kv_heads some dim_head"],
        v: Float[Tensor, "batch kv_heads some dim_head"],
        seen: Bool[Tensor, "batch 1 1 some"],
    ) -> Float[Tensor, "heads seq some"]:
        """See `ObservedAttention`; the null key is the first."""
        del v
        keys = k[sample].float().repeat_interleave(q.shape[1] // k.shape[1], dim=0)
        scores = torch.einsum("hid,hjd->hij", q[sample].float() * q.shape[-1] ** -0.5, keys)
        return scores.masked_fill(~seen[sample], -torch.inf).softmax(-1)

    def _asked(self, x: Tensor) -> Tensor:
        return self.queries(self.norm(x))


def shared_attention(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch kv_heads keys dim_head"],
    v: Float[Tensor, "batch kv_heads keys dim_head"],
    mask: Tensor,
) -> Float[Tensor, "batch heads seq dim_head"]:
    """Fused attention; queries of heads that share a key head are rows of one head, so that no key is copied."""
    if k.shape[1] == q.shape[1]:
        return fused_attention(q, k, v, mask)
    if mask.shape[1] == 1:
        grouped = rearrange(q, "b (kh g) n d -> b kh (g n) d", kh=k.shape[1])
        mixed = fused_attention(grouped, k, v, mask)
        return rearrange(mixed, "b kh (g n) d -> b (kh g) n d", n=q.shape[2])
    assert q.shape[2] == 1 == k.shape[1], "a mask for every head comes with one position and one key head"
    q, mask = rearrange(q, "b h 1 d -> b 1 h d"), rearrange(mask, "b h 1 j -> b 1 h j")
    return rearrange(fused_attention(q, k, v, mask), "b 1 h d -> b h 1 d")
