"""The attention function of a layer: projections around one pattern."""

import torch
from einops import rearrange
from torch import nn

from tokscale.base.shapes import Bool, Float, Tensor
from tokscale.nn.attention.backend import attend, choose_backend
from tokscale.nn.attention.decode import DeviceStep, KeyValueCache
from tokscale.nn.attention.observed import ObservedAttention
from tokscale.nn.attention.pattern import AttentionPattern
from tokscale.nn.attention.reference import attention_weights
from tokscale.nn.config import Backend, StackConfig
from tokscale.nn.layout import TokenLayout
from tokscale.nn.regions import region
from tokscale.nn.rotary import rotate, rotate_by_parts


def _heads_of(made: Float[Tensor, "batch seq three_heads dim_head"]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = rearrange(made, "b n (three h) d -> three b h n d", three=3)
    return q, k, v


def _split_and_rotate(
    made: Float[Tensor, "batch seq width"], table: Float[Tensor, "seq half_dim_head two"], *, dim_head: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _heads_of(rotate(rearrange(made, "b n (three_h d) -> b n three_h d", d=dim_head), table))


@region(eager=_split_and_rotate)
def split_and_rotate(
    made: Float[Tensor, "batch seq width"], table: Float[Tensor, "seq half_dim_head two"], *, dim_head: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, keys and values of all heads, from their joint projection.

    Each in memory of its own, so that the gradients of the three are written into one tensor in one pass.
    """
    parts = made.unflatten(-1, (3, -1, dim_head)).unbind(2)
    q, k, v = (rearrange(rotate_by_parts(part, table).contiguous(), "b n h d -> b h n d") for part in parts)
    return q, k, v


class Attention(ObservedAttention):
    """Multi-head self-attention over a pattern. `forward` is `project(attend(*qkv(x)))`.

    The three steps are methods of their own so that activation checkpointing can go around the middle one.
    """

    def __init__(self, config: StackConfig, pattern: AttentionPattern) -> None:
        super().__init__()
        self.pattern = pattern
        self.dim_head = config.dim_head
        self.backend_override: Backend | None = None if config.attn_backend == "auto" else config.attn_backend
        self.stable = config.stable
        inner = config.heads * config.dim_head
        self.to_qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.dim)
        self.dropout = nn.Dropout(config.attn_dropout)

    def qkv(
        self, x: Float[Tensor, "batch seq dim"], rotary: Float[Tensor, "seq half_dim_head two"] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each `batch heads seq dim_head`; all three are rotated, as in the original."""
        made = self.to_qkv(x)
        if rotary is None:
            return _heads_of(rearrange(made, "b n (three_h d) -> b n three_h d", d=self.dim_head))
        return split_and_rotate(made, rotary, dim_head=self.dim_head)

    def attend(
        self,
        q: Float[Tensor, "batch heads seq dim_head"],
        k: Float[Tensor, "batch heads seq dim_head"],
        v: Float[Tensor, "batch heads seq dim_head"],
        key_mask: Bool[Tensor, "batch total"] | None = None,
        *,
        offset: int | DeviceStep = 0,
        cache: KeyValueCache | None = None,
        layout: TokenLayout | None = None,
    ) -> Float[Tensor, "batch heads seq dim_head"]:
        """Attention proper; with a cache, from positions `[offset, offset + seq)` to all so far.

        `layout` is the sequence's, where it is not the pattern's own; a cache knows it.
        """
        if cache is not None and offset != 0:
            return cache.extend(q, k, v, offset, key_mask)
        pattern = cache.pattern if cache is not None else self.pattern if layout is None else self.pattern.over(layout)
        grad = torch.is_grad_enabled() and q.requires_grad
        masked, length = key_mask is not None, q.shape[2]
        backend = self.backend_for(q.device, q.dtype, grad=grad, length=length, masked=masked, layout=pattern.layout)
        if cache is not None:
            cache.append(k, v, 0)
        return attend(q, k, v, pattern, key_mask, backend=backend, stable=self.stable)

    def weights(
        self,
        sample: int,
        q: Float[Tensor, "batch heads seq dim_head"],
        k: Float[Tensor, "batch heads seq dim_head"],
        v: Float[Tensor, "batch heads seq dim_head"],
        key_mask: Bool[Tensor, "batch total"] | None = None,
        *,
        offset: int | DeviceStep = 0,
        cache: KeyValueCache | None = None,
        layout: TokenLayout | None = None,
    ) -> Float[Tensor, "heads seq seq"]:
        """See `ObservedAttention`; of whole sequences alone, not of steps of decoding."""
        assert offset == 0 and cache is None
        del v
        one = slice(sample, sample + 1)
        pattern = self.pattern if layout is None else self.pattern.over(layout)
        mask = None if key_mask is None else key_mask[one]
        return attention_weights(q[one].float(), k[one].float(), pattern, mask, stable=self.stable)[0]

    def project(self, mixed: Float[Tensor, "batch heads seq dim_head"]) -> Float[Tensor, "batch seq dim"]:
        """Heads back to the residual width."""
        return self.dropout(self.to_out(rearrange(mixed, "b h n d -> b n (h d)")))

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        rotary: Float[Tensor, "seq half_dim_head two"] | None = None,
        key_mask: Bool[Tensor, "batch total"] | None = None,
        *,
        offset: int | DeviceStep = 0,
        cache: KeyValueCache | None = None,
        layout: TokenLayout | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Self-attention over positions `[offset, offset + seq)`; with a cache, to all positions so far."""
        return self.project(self.attend(*self.qkv(x, rotary), key_mask, offset=offset, cache=cache, layout=layout))

    def backend_for(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        grad: bool,
        length: int,
        masked: bool,
        layout: TokenLayout | None = None,
    ) -> Backend:
        """How this function is computed in the given circumstances; see `choose_backend`."""
        pattern = self.pattern if layout is None else self.pattern.over(layout)
        return choose_backend(
            pattern, device, dtype, grad=grad, length=length, masked=masked, backend_override=self.backend_override
        )


def training_backends(model: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, list[Backend]]:
    """How training computes whole sequences: the backends of each attention kind in `model`, for the record.

    Args:
        model: Any module; attention that is not over a pattern is not counted.
        device: Where it trains.
        dtype: Of the queries.
    """
    found: dict[str, set[Backend]] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            length = module.pattern.layout.seq
            backend = module.backend_for(device, dtype, grad=True, length=length, masked=False)
            found.setdefault(module.pattern.kind, set()).add(backend)
    return {kind: sorted(backends) for kind, backends in sorted(found.items())}
