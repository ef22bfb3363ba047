"""Options of RQ-Transformer and of its generalisation, under the names of the original (RQ-transformer 0.1.9)."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from tokscale.base.config import MOST_LAYERS, LayerCount
from tokscale.base.errors import ConfigError
from tokscale.base.protocols import ImageTokenizer, TextTokenizer
from tokscale.models.common import fit_sizes
from tokscale.models.grids import Grid, GridsConfig, largest
from tokscale.models.model import AnyModelConfig
from tokscale.nn.conditioning import ConditionConfig
from tokscale.nn.config import AttentionKindName, Backend, StackConfig
from tokscale.nn.guidance import GuidedSampling
from tokscale.nn.layout import TokenLayout


class HierarchyConfig(AnyModelConfig):
    """What every hierarchy of causal stacks has in common. The defaults are the original's plain blocks."""

    dim: PositiveInt
    """Width of the residual stream of every stage."""
    heads: PositiveInt = 8
    """Attention heads."""
    dim_head: PositiveInt = 64
    """Width of one head."""
    ff_mult: float = Field(default=4, gt=0)
    """Width of the feed-forward's hidden layer, as a multiple of `dim`."""
    ff_glu: bool = False
    """Gate the feed-forward (GEGLU): three matrices in place of two."""
    layer_scale: bool = False
    """A learned factor per channel on each branch, small at first."""
    attn_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after attention's output projection (in the original: on the probabilities)."""
    ff_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the feed-forward's hidden layer."""
    rotary_emb: bool = False
    """Rotary positions in place of learned ones."""
    shift_tokens: bool = False
    """Feed part of the channels from the previous token, or from the neighbours above and to the left."""
    sandwich_norm: bool = False
    """A second norm after each branch."""
    attn_types: tuple[AttentionKindName, ...] = Field(default=("full",), max_length=MOST_LAYERS)
    """Attention kinds of the first stage, cycled over its layers. Later stages are short, and always `full`."""
    kernel_size: PositiveInt = 5
    """Side of the `conv_like` window, in places; odd."""
    reversible: bool = False
    """Two residual streams whose activations are recomputed in the backward pass."""
    shared_attn_ids: tuple[int | str, ...] | None = Field(default=None, max_length=MOST_LAYERS)
    """Layers of a stage with the same id share one attention function; cycled over the stage's layers."""
    shared_ff_ids: tuple[int | str, ...] | None = Field(default=None, max_length=MOST_LAYERS)
    """The same for feed-forwards."""
    remat: Literal["none", "block", "regions"] = "none"
    """Recompute activations in the backward pass: whole layers, or everything but the attention call."""
    attn_backend: Literal["auto"] | Backend = "auto"
    """How attention is computed."""
    num_tokens: int | None = Field(default=None, ge=1)
    """Entries of the image tokenizer's codebook. Taken from the tokenizer when left out."""
    pad_id: int = -1
    """Stands where there is no code: it is embedded as zeros, and not counted in the loss. Never a code itself."""
    shared_code_emb: bool = True
    """One embedding for all levels, which is right for tokenizers whose levels share a codebook. False: one per level,
    for codebooks per level, where the same number means something else at each level."""
    cumulative_depth: bool = False
    """Feed the last stage the sum of the codes so far (arXiv:2203.01941, equation 9), not the last code alone."""
    condition: ConditionConfig | None = None
    """What the model is told beside the image; a prefix of the first stage. Nothing when left out."""
    num_text_tokens: int | None = Field(default=None, ge=2)
    """Entries of the text tokenizer. Taken from the tokenizer when left out; `condition.kind=caption` needs it."""
    text_seq_len: PositiveInt = 32
    """Positions of the prefix for captions and embeddings; longer ones are cut. A class takes one position."""
    cond_drop_prob: float = Field(default=0.0, ge=0, le=1)
    """Share of training samples whose condition is hidden, which is what guidance at sampling time needs."""

    @field_validator("attn_types", "shared_attn_ids", "shared_ff_ids", mode="before")
    @classmethod
    def _one_is_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int) else value

    @model_validator(mode="after")
    def _stacks_are_possible(self) -> Self:
        for number, layers in enumerate(self.layers):
            self._stack(number, layers)
        if self.num_tokens is not None and 0 <= self.pad_id < self.num_tokens:
            raise ValueError(f"pad_id={self.pad_id} is one of the {self.num_tokens} codes; take -1")
        return self

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Layers of each stage."""

    @property
    @abstractmethod
    def lengths(self) -> tuple[int, ...]:
        """Entries of each stage.

        Raises:
            ConfigError: When they are neither given nor fitted.
        """

    @property
    @abstractmethod
    def code_shape(self) -> tuple[int, ...]:
        """Shape of one image's codes. Raises as `lengths`."""

    @property
    def codes(self) -> int:
        """Entries of the codebook.

        Raises:
            ConfigError: When they are neither given nor fitted.
        """
        if self.num_tokens is None:
            raise _unknown("num_tokens")
        return self.num_tokens

    @property
    def prefix(self) -> int:
        """Positions that the condition takes before the start."""
        return 0 if self.condition is None else self.condition.length(self.text_seq_len)

    def stacks(self) -> list[tuple[StackConfig, TokenLayout]]:
        """Options and layout of each stage. Raises as `lengths`."""
        lengths = self.lengths
        grids = [self.first_grid] + [None] * (len(lengths) - 1)
        layouts = [
            TokenLayout(length) if grid is None else TokenLayout(self.prefix + 1, *grid)
            for length, grid in zip(lengths, grids, strict=True)
        ]
        return [
            (self._stack(n, count), layout) for n, (count, layout) in enumerate(zip(self.layers, layouts, strict=True))
        ]

    @property
    def first_grid(self) -> tuple[int, int]:
        """Rows and columns of the first stage's entries: one row, unless they are an image. Raises as `lengths`."""
        return 1, self.lengths[0]

    def _stack(self, number: int, layers: int) -> StackConfig:
        shared = set(StackConfig.model_fields) & set(HierarchyConfig.model_fields)
        options: dict[str, Any] = {name: getattr(self, name) for name in shared}
        options["depth"] = layers
        if number:
            options["attn_types"] = ("full",)
        return StackConfig(**options)

    def fitted(self, image: ImageTokenizer, text: TextTokenizer | None) -> Self:
        """This configuration with its sizes taken from the tokenizers.

        Raises:
            ConfigError: When a size was given and is another.
        """
        words = None if text is None else text.num_tokens
        config = fit_sizes(
            self, num_tokens=(image.num_tokens, "image tokenizer"), num_text_tokens=(words, "text tokenizer")
        )
        if 0 <= self.pad_id < image.num_tokens:
            raise ConfigError(f"model.pad_id: {self.pad_id} is one of the {image.num_tokens} codes; take -1")
        return config


class RQTransformerConfig(HierarchyConfig, GridsConfig):
    """A spatial stack over the places of an image, and a depth stack over the codes of each (arXiv:2203.01941)."""

    kind: Literal["rqtransformer"] = "rqtransformer"
    spatial_layers: LayerCount
    """Layers of the stack over places."""
    depth_layers: LayerCount
    """Layers of the stack over the codes of one place."""
    max_spatial_seq_len: int | None = Field(default=None, ge=1)
    """Places. Taken from the tokenizer's grid when left out."""
    depth_seq_len: int | None = Field(default=None, ge=1)
    """Codes of one place. Taken from the tokenizer when left out; 1 for a tokenizer without levels."""
    image_grid: tuple[PositiveInt, PositiveInt] | None = None
    """Rows and columns of the places. Taken from the tokenizer; without one, the places are a line."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of each stage."""
        return self.spatial_layers, self.depth_layers

    @property
    def lengths(self) -> tuple[int, ...]:
        """Places, and codes of each.

        Raises:
            ConfigError: When they are neither given nor fitted.
        """
        if self.max_spatial_seq_len is None or self.depth_seq_len is None:
            raise _unknown("max_spatial_seq_len and model.depth_seq_len")
        return self.max_spatial_seq_len, self.depth_seq_len

    @property
    def first_grid(self) -> tuple[int, int]:
        """Rows and columns of the places. Raises as `lengths`."""
        return self.image_grid or super().first_grid

    @property
    def code_shape(self) -> tuple[int, ...]:
        """`grid_h grid_w levels`, or `places levels` without a grid. Raises as `lengths`."""
        return self.lengths if self.image_grid is None else (*self.image_grid, self.lengths[1])

    def fitted(self, image: ImageTokenizer, text: TextTokenizer | None) -> Self:
        """This configuration with its sizes taken from the tokenizers.

        Raises:
            ConfigError: When a size was given and is another.
        """
        rows, cols, *levels = image.code_shape
        source = "image tokenizer"
        return fit_sizes(
            super().fitted(image, text),
            image_grid=((rows, cols), source),
            max_spatial_seq_len=(rows * cols, source),
            depth_seq_len=(levels[0] if levels else 1, source),
        )

    def with_grids(self, grids: Sequence[Grid]) -> Self:
        """See `AnyModelConfig.with_grids`."""
        rows, columns = largest(grids)
        return super().with_grids(grids).model_copy(update={"max_spatial_seq_len": rows * columns})


class HierarchicalConfig(HierarchyConfig):
    """Any number of stages: each predicts what its entries are made of, coarse to fine."""

    kind: Literal["hierarchical"] = "hierarchical"
    depth: tuple[PositiveInt, ...] = Field(min_length=2)
    """Layers of each stage, coarse to fine."""
    max_seq_len: tuple[PositiveInt, ...] | None = None
    """Entries of each stage; their product is the number of codes. The axes of the tokenizer's codes when left out."""
    returned_shape: tuple[PositiveInt, ...] | None = None
    """Shape in which codes are returned. Taken from the tokenizer; without one, that of `max_seq_len`."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of each stage."""
        return self.depth

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries of each stage.

        Raises:
            ConfigError: When they are neither given nor fitted.
        """
        if self.max_seq_len is None:
            raise _unknown("max_seq_len")
        return self.max_seq_len

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of one image's codes. Raises as `lengths`."""
        return self.returned_shape or self.lengths

    @model_validator(mode="after")
    def _as_many_lengths_as_stages(self) -> Self:
        if self.max_seq_len is not None and len(self.max_seq_len) != len(self.depth):
            raise ValueError(f"max_seq_len={list(self.max_seq_len)} for {len(self.depth)} stages; give one length each")
        return self

    def fitted(self, image: ImageTokenizer, text: TextTokenizer | None) -> Self:
        """This configuration with its sizes taken from the tokenizers.

        Raises:
            ConfigError: When the stages do not hold as many codes as an image has.
        """
        shape = tuple(image.code_shape)
        lengths = self.max_seq_len or shape
        if len(lengths) != len(self.depth) or math.prod(lengths) != math.prod(shape):
            raise ConfigError(
                f"model.max_seq_len: {list(lengths)} does not cut codes of shape {shape} into {len(self.depth)} "
                "stages; give one length per stage whose product is the number of codes"
            )
        return super().fitted(image, text).model_copy(update={"max_seq_len": lengths, "returned_shape": shape})


def _unknown(names: str) -> ConfigError:
    return ConfigError(
        f"model.{names} not known yet; give a value, or call `config.fitted(image_tokenizer, text_tokenizer)`"
    )


PerLevel = tuple[Annotated[float, Field(ge=0)], ...]


class RQSampling(GuidedSampling):
    """How codes are drawn. Numbers are one for all levels, or a list with one for each."""

    temperature: PerLevel = Field(default=(1.0,), min_length=1)
    """Divides the logits; 0 takes the most likely code."""
    filter_thres: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(default=(0.9,), min_length=1)
    """Share of the codebook that is never drawn: 0.9 keeps the best tenth (top-k)."""
    top_p: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(default=(1.0,), min_length=1)
    """Keep the most likely codes that together have this probability; 1 keeps all."""

    @field_validator("temperature", "filter_thres", "top_p", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value

    def at(self, level: int) -> tuple[float, float, float]:
        """Temperature, filter and nucleus of a level, counted from 0."""
        first, second, third = (
            values[min(level, len(values) - 1)] for values in (self.temperature, self.filter_thres, self.top_p)
        )
        return first, second, third

    def check(self, levels: int) -> None:
        """Raise unless every list has one number, or one for each of `levels`.

        Raises:
            ConfigError: Naming the option.
        """
        for name in ("temperature", "filter_thres", "top_p"):
            values = getattr(self, name)
            if len(values) not in (1, levels):
                raise ConfigError(
                    f"sampling.{name}: got {list(values)} for {levels} levels; give one number, or {levels}"
                )
