"""Options of the transformer stack, under the names of the original (DALLE-pytorch 1.6.6)."""

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from tokscale.base.config import MOST_LAYERS, Config, LayerCount
from tokscale.nn.attention.pattern import AttentionKindName, Backend
from tokscale.nn.attention.sparsity import SparseLayout, VariableLayout


class StackConfig(Config):
    """A pre-norm transformer over text and image tokens."""

    dim: PositiveInt
    """Width of the residual stream."""
    depth: LayerCount
    """Layers, each attention and feed-forward."""
    heads: PositiveInt = 8
    """Attention heads."""
    dim_head: PositiveInt = 64
    """Width of one head; fast kernels want 32 to 128."""
    ff_mult: float = Field(default=4, gt=0)
    """Width of the feed-forward's hidden layer, as a multiple of `dim`."""
    ff_glu: bool = True
    """Gate the hidden layer (GEGLU, arXiv:2002.05202), with three matrices; false: two matrices around one GELU."""
    layer_scale: bool = True
    """A learned factor per channel on each branch, small at first (CaiT, arXiv:2103.17239)."""
    attn_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after attention's output projection (as in the original, not on the probabilities)."""
    ff_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the feed-forward's hidden layer."""
    attn_types: tuple[AttentionKindName, ...] = Field(default=("full",), max_length=MOST_LAYERS)
    """Attention kinds, cycled over the depth. One name alone is accepted too."""
    kernel_size: PositiveInt = 5
    """Side of the `conv_like` window, in tokens; odd."""
    dilation: PositiveInt = 1
    """Distance between neighbours in the `conv_like` window, in tokens."""
    conv_window: Literal["corner", "centered"] = "corner"
    """Window of causal `conv_like` layers. `corner`: the query is the bottom right one, so neighbours above to the
    right are not seen. `centered`: the query is the centre, and every neighbour before it in raster order is seen
    (arXiv:2102.12092, figure 11). Bidirectional stacks need `centered`, and see the whole centred window."""
    sparse: SparseLayout = VariableLayout()
    """Block layout of `sparse` layers."""
    reversible: bool = False
    """Two residual streams whose activations are recomputed in the backward pass. Another function than the plain
    stack: weights of one do not fit the other. To save memory alone, prefer `remat`."""
    shared_attn_ids: tuple[int | str, ...] | None = Field(default=None, max_length=MOST_LAYERS)
    """Layers of the same id share one attention function (norm and scale stay their own); cycled over the depth."""
    shared_ff_ids: tuple[int | str, ...] | None = Field(default=None, max_length=MOST_LAYERS)
    """The same for feed-forwards."""
    stable: bool = False
    """The original's softmax, logits divided first. Mathematically nothing; only the `dense` backend computes it so."""
    sandwich_norm: bool = False
    """A second norm after each branch (CogView, arXiv:2105.13290)."""
    shift_tokens: bool = False
    """Feed part of the channels from the previous token, or from the neighbours above and to the left."""
    rotary_emb: bool = True
    """Rotary positions on queries, keys and values: one axis for text, two for the image."""
    rotary_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """What the table of rotary angles is rounded to. `fp16` and `bf16` are for imports alone: the original trained with
    `--fp16` kept its table in half precision, where 8192 radians are known to 8, and learned with what came of it."""
    optimize_for_inference: bool = False
    """Accepted as the original has it: masked dense attention there; here outputs and speed do not change."""
    remat: Literal["none", "block", "regions"] = "none"
    """Recompute activations in the backward pass: whole layers, or everything but the attention call. A feed-forward
    keeps its hidden layer alone in any case."""
    attn_backend: Literal["auto"] | Backend = "auto"
    """How attention is computed. `auto`: the fastest way that is exact on this device and dtype. Kinds that an override
    does not know are chosen for; calls with a key padding mask take `sdpa` unless `dense` is asked for."""

    @field_validator("attn_types", "shared_attn_ids", "shared_ff_ids", mode="before")
    @classmethod
    def _one_is_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int) else value

    @field_validator("attn_types", "shared_attn_ids", "shared_ff_ids")
    @classmethod
    def _not_empty(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if value == ():
            raise ValueError("got an empty list; give at least one entry, or leave the option out")
        return value

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"got {value}; the window needs a middle, so an odd size such as {value + 1}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "StackConfig":
        if self.reversible and self.remat != "none":
            raise ValueError(
                f"reversible=true cannot honour remat={self.remat!r}: it recomputes every activation already; "
                "use remat=none"
            )
        if self.shift_tokens and self.dim % 4:
            raise ValueError(f"shift_tokens=true needs dim divisible by 4, got dim={self.dim}")
        if self.rotary_emb and (self.dim_head % 2 or self.dim_head < 6):
            raise ValueError(f"rotary_emb=true needs an even dim_head of at least 6, got {self.dim_head}")
        kinds: dict[int | str, tuple[int, str]] = {}
        for layer, (identity, kind) in enumerate(zip(self.attn_ids(), self.layer_types(), strict=True)):
            first, known = kinds.setdefault(identity, (layer, kind))
            if known != kind:
                raise ValueError(
                    f"shared_attn_ids: layers {first} and {layer} share id {identity!r}, but attn_types makes them "
                    f"{known!r} and {kind!r}; give them different ids or the same kind"
                )
        return self

    def layer_types(self) -> tuple[AttentionKindName, ...]:
        """The attention kind of each layer."""
        return tuple(self.attn_types[layer % len(self.attn_types)] for layer in range(self.depth))

    def attn_ids(self) -> tuple[int | str, ...]:
        """Per layer, the identity of its attention function."""
        return self._cycle(self.shared_attn_ids)

    def ff_ids(self) -> tuple[int | str, ...]:
        """Per layer, the identity of its feed-forward function."""
        return self._cycle(self.shared_ff_ids)

    def _cycle(self, ids: tuple[int | str, ...] | None) -> tuple[int | str, ...]:
        return tuple(range(self.depth)) if ids is None else tuple(ids[layer % len(ids)] for layer in range(self.depth))
