"""Options of Parti, under the names of the original (parti-pytorch 0.2.0) where it has them."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from tokscale.base.config import MOST_LAYERS, LayerCount
from tokscale.base.errors import ConfigError
from tokscale.base.protocols import ImageTokenizer, TextTokenizer
from tokscale.base.registry import NameIn
from tokscale.models.common import fit_sizes
from tokscale.models.grids import GridsConfig
from tokscale.nn.attention.pattern import KINDS
from tokscale.nn.attention.relative import OffsetIndex
from tokscale.nn.conditioning import ConditionConfig, EmbeddingsConfig
from tokscale.nn.guidance import GuidedSampling

SharedKindName = Annotated[str, NameIn(KINDS, lambda kind: not kind.per_head)]
"""An attention kind under which all heads see the same keys, since with `multi_query` they share them."""


class PartiConfig(GridsConfig):
    """A causal decoder over `[start, image codes]` that attends to a caption.

    The defaults are the original's decoder. The paper's (arXiv:2206.10789) is the same with `condition.kind=caption`,
    `rel_pos_bias=false`, `multi_query=false`, `attn_types=conv_like`, `conv_window=centered` and `ff_norm=false`, as in
    `model=parti/paper_20b`.
    """

    kind: Literal["parti"] = "parti"
    dim: PositiveInt
    """Width of the decoder's residual stream."""
    depth: LayerCount
    """Decoder layers, each self-attention, attention to the caption, and feed-forward."""
    heads: PositiveInt = 8
    """Attention heads."""
    dim_head: PositiveInt = 64
    """Width of one head."""
    ff_mult: float = Field(default=4, gt=0)
    """Width of the feed-forward's hidden layer, as a multiple of `dim`. It is not gated."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the projections of attention, and on the feed-forward's hidden layer. Paper: 0.1."""
    num_image_tokens: int | None = Field(default=None, ge=1)
    """Entries of the image tokenizer's codebook (seed: `vae_codebook_size`). Taken from the tokenizer when left out."""
    image_grid: tuple[PositiveInt, PositiveInt] | None = None
    """Rows and columns of the image's codes. Taken from the tokenizer when left out."""
    num_text_tokens: int | None = Field(default=None, ge=2)
    """Entries of the text tokenizer; only `condition.kind=caption` has use for it."""
    max_text_len: PositiveInt = 128
    """Caption tokens, and the most states of a frozen encoder that are read."""
    condition: ConditionConfig = EmbeddingsConfig()
    """What the decoder attends to: states of a frozen encoder (the original), or an encoder trained with it as in the
    paper."""
    cond_drop_prob: float = Field(default=0.25, ge=0, lt=1)
    """Share of training samples whose caption is hidden, which is what guidance at sampling time needs."""
    multi_query: bool = True
    """One head of keys and values for all heads of queries (arXiv:1911.02150)."""
    kv_tied: bool = False
    """Keys and values are one tensor, as in the original, whose checkpoints need it."""
    rel_pos_bias: bool = True
    """Self-attention has a learned bias for every 2-D offset and a null key; needs `attn_types=full`. Without it, the
    kinds of `attn_types` and the learned positions tell places apart."""
    rel_pos_index: OffsetIndex = "raster"
    """Where a code lies for that bias: at its place in the image. `sequence` counts from the start token, one place
    off, as the original does, whose checkpoints need it."""
    attn_types: tuple[SharedKindName, ...] = Field(default=("full",), max_length=MOST_LAYERS)
    """Kinds of self-attention, cycled over the depth. One name alone is accepted too. Paper: `conv_like`."""
    kernel_size: PositiveInt = 5
    """Side of the `conv_like` window, in codes; odd."""
    conv_window: Literal["corner", "centered"] = "centered"
    """Window of `conv_like`: `centered` on the query, `corner` has it in the lower right corner."""
    ff_norm: bool = True
    """A norm inside the feed-forward, after its activation."""
    sandwich_norm: bool = False
    """A second norm after each branch (CogView, arXiv:2105.13290)."""
    remat: Literal["none", "block"] = "none"
    """Recompute the activations of each layer in the backward pass. What is cheap, norms and the feed-forward's
    activations, is computed again in any case."""
    reversible: Literal[False] = False
    """Refused when true: see the error."""

    @field_validator("attn_types", mode="before")
    @classmethod
    def _one_is_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("attn_types")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value == ():
            raise ValueError("got an empty list; give at least one kind, or leave the option out")
        return value

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"got {value}; the window needs a middle, so an odd size such as {value + 1}")
        return value

    @field_validator("reversible", mode="before")
    @classmethod
    def _irreversible(cls, value: Any) -> Any:
        if value:
            raise ValueError(
                "parti cannot be reversible: the caption's states that every layer reads have gradients of their own, "
                "which a stream that is recomputed backwards does not carry; use reversible=false remat=block"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.rel_pos_bias and set(self.attn_types) != {"full"}:
            raise ValueError(
                f"rel_pos_bias=true reads every offset, so it cannot honour attn_types={list(self.attn_types)}; "
                "use rel_pos_bias=false"
            )
        if self.rel_pos_index != "raster" and not self.rel_pos_bias:
            raise ValueError(f"rel_pos_index={self.rel_pos_index!r} does nothing with rel_pos_bias=false; leave it out")
        return self

    @property
    def text_seq_len(self) -> int:
        """Width of the caption ids."""
        return self.max_text_len

    def fitted(self, image: ImageTokenizer, text: TextTokenizer | None) -> Self:
        """This configuration with its sizes taken from the tokenizers.

        Raises:
            ConfigError: When a size was given and is another, or the codes have more than one level.
        """
        if len(image.code_shape) != 2:
            raise ConfigError(
                f"model.kind=parti reads one code per grid cell, but the image tokenizer gives {image.code_shape}; "
                "choose a tokenizer without residual levels, or model.kind=rqtransformer"
            )
        words = text.num_tokens if text is not None and self.condition.reads_captions else None
        return fit_sizes(
            self,
            num_image_tokens=(image.num_tokens, "image tokenizer"),
            image_grid=(tuple(image.code_shape), "image tokenizer"),
            num_text_tokens=(words, "text tokenizer"),
        )

    @property
    def sizes(self) -> tuple[int, tuple[int, int]]:
        """Image codes, and the grid.

        Raises:
            ConfigError: When they are neither given nor fitted.
        """
        if self.num_image_tokens is None or self.image_grid is None:
            raise ConfigError(
                "model.num_image_tokens and model.image_grid are not known yet; give them, or call "
                "`config.fitted(image_tokenizer, text_tokenizer)`"
            )
        return self.num_image_tokens, self.image_grid


class PartiSampling(GuidedSampling):
    """How codes are drawn from a trained Parti."""

    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits; 0 takes the most likely code."""
    filter_thres: float = Field(default=0.9, ge=0, lt=1)
    """Share of the codebook that is never drawn: 0.9 keeps the best tenth (top-k)."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the most likely codes that together have this probability; 1 keeps all."""
    cond_scale: float = Field(default=3.0, ge=0)
    """See `GuidedSampling`; parti-pytorch's default."""
