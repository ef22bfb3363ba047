"""Conditioning: text, embeddings or class labels, as a sequence that a model's layers attend to.

Caption ids read by an encoder of the model's own, states of a frozen language model that come with the batch, a class,
or nothing at all. Models see one thing: a context and a mask. Without a condition the mask is all False.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, assert_never

import torch
from einops import rearrange
from pydantic import Field, PositiveInt
from torch import nn

from tokscale.base.batch import LABELS, TEXT_EMBEDS, TEXT_EMBEDS_MASK
from tokscale.base.config import Config, LayerCount
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.kinds import require_own
from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.nn.config import StackConfig
from tokscale.nn.layout import TokenLayout
from tokscale.nn.stack import Stack


class AnyConditionConfig(Config):
    """Base of the kinds of conditions: each says what it reads and what it takes from the data."""

    reads_captions: ClassVar[bool]
    """Whether it reads the ids of a text tokenizer."""
    reads_states: ClassVar[bool]
    """Whether it reads the states of a text encoder."""
    reads_labels: ClassVar[bool]
    """Whether it reads the number of a class."""

    def length(self, text_seq_len: int) -> int:
        """How many states its context has, where captions are cut to `text_seq_len` tokens."""
        raise NotImplementedError

    def fitted(self, *, width: int | None, labels: int | None) -> Self:
        """This configuration with what the data dictate.

        Args:
            width: Of each state of the text encoder; None without one.
            labels: Those of the data are in `[0, labels)`; None without any.

        Raises:
            ConfigError: When something that it reads is missing, or is another than was given.
        """
        raise NotImplementedError

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a kind without one of its parts."""
        super().__pydantic_init_subclass__(**kwargs)
        require_own(cls, AnyConditionConfig, ["reads_captions", "reads_states", "reads_labels", "length", "fitted"])


class CaptionConfig(AnyConditionConfig):
    """Caption ids, read by a bidirectional encoder that is trained with the model."""

    reads_captions, reads_states, reads_labels = True, False, False
    kind: Literal["caption"] = "caption"
    dim: PositiveInt | None = None
    """Width of the encoder; the model's own when left out."""
    depth: LayerCount = 2
    """Layers of the encoder. Parti: 12 to 16."""
    heads: PositiveInt = 8
    """Attention heads."""
    dim_head: PositiveInt = 64
    """Width of one head."""
    ff_mult: float = Field(default=4, gt=0)
    """Width of the feed-forward's hidden layer, as a multiple of `dim`."""
    ff_glu: bool = True
    """Gate the hidden layer (GEGLU), with three matrices; false: two matrices around one GELU."""
    layer_scale: bool = True
    """A learned factor per channel on each branch, small at first."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after attention and on the feed-forward's hidden layer."""
    remat: Literal["none", "block", "regions"] = "none"
    """Recompute activations in the backward pass."""

    def length(self, text_seq_len: int) -> int:
        """One state a token."""
        return text_seq_len

    def fitted(self, *, width: int | None, labels: int | None) -> Self:
        """Nothing comes from the data."""
        del width, labels
        return self


class EmbeddingsConfig(AnyConditionConfig):
    """States of a frozen text encoder, made by the stage or read from token shards."""

    reads_captions, reads_states, reads_labels = False, True, False
    kind: Literal["embeddings"] = "embeddings"
    width: PositiveInt | None = None
    """Of each state. Taken from the text encoder when left out."""

    def length(self, text_seq_len: int) -> int:
        """One state a token of the encoder's."""
        return text_seq_len

    def fitted(self, *, width: int | None, labels: int | None) -> Self:
        """With the encoder's width. See `AnyConditionConfig`."""
        del labels
        if width is None:
            raise ConfigError(
                "model.condition.kind=embeddings needs the states of a text encoder: give text_encoder=FOLDER"
            )
        if self.width not in (None, width):
            raise ConfigError(
                f"model.condition.width: got {self.width}, but the text encoder has {width}; leave the key out"
            )
        return self.model_copy(update={"width": width})


class ClassesConfig(AnyConditionConfig):
    """One of a number of classes."""

    reads_captions, reads_states, reads_labels = False, False, True
    kind: Literal["classes"] = "classes"
    num_classes: PositiveInt
    """Labels are in `[0, num_classes)`."""
    width: PositiveInt | None = None
    """Of a class's vector; the model's own when left out."""

    def length(self, text_seq_len: int) -> int:
        """One state an image."""
        del text_seq_len
        return 1

    def fitted(self, *, width: int | None, labels: int | None) -> Self:
        """As it is, when the data have no other classes. See `AnyConditionConfig`."""
        del width
        if labels is None or labels > self.num_classes:
            stored = (
                "the data set has no labels; tokenize with labels=true"
                if labels is None
                else f"labels go to {labels - 1}"
            )
            raise ConfigError(f"model.condition.num_classes={self.num_classes}: {stored}")
        return self


class NothingConfig(AnyConditionConfig):
    """Nothing: the model learns the images alone."""

    reads_captions, reads_states, reads_labels = False, False, False
    kind: Literal["none"] = "none"

    def length(self, text_seq_len: int) -> int:
        """One state, which nobody sees."""
        del text_seq_len
        return 1

    def fitted(self, *, width: int | None, labels: int | None) -> Self:
        """Nothing comes from the data."""
        del width, labels
        return self


ConditionConfig = Annotated[
    CaptionConfig | EmbeddingsConfig | ClassesConfig | NothingConfig, Field(discriminator="kind")
]
"""The condition of a model, discriminated by `kind`."""


class Context(NamedTuple):
    """What layers attend to."""

    states: Float[Tensor, "batch words width"]
    """Embeddings come in the type they were stored in: a layer casts them to that of its own weights."""
    mask: Bool[Tensor, "batch words"]
    """True where a state may be seen."""

    def only(self, kept: Bool[Tensor, " batch"]) -> "Context":
        """The same, with every state hidden from the samples that are not kept."""
        return Context(self.states, self.mask & rearrange(kept, "b -> b 1"))


class Conditioning(nn.Module):
    """Turns what a batch says into a context.

    Args:
        config: The kind.
        dim: Width of the model, for what its configuration leaves open.
        num_text_tokens: Entries of the text tokenizer; `caption` needs them.
        text_seq_len: Width of the caption ids; likewise.

    Raises:
        ConfigError: When a size is not known.
    """

    def __init__(
        self, config: ConditionConfig, *, dim: int, num_text_tokens: int | None = None, text_seq_len: int | None = None
    ):
        super().__init__()
        self.config = config
        match config:
            case CaptionConfig():
                if num_text_tokens is None or text_seq_len is None:
                    raise ConfigError(
                        "model.num_text_tokens is not known yet, and model.condition.kind=caption needs it; give it, "
                        "or call `config.fitted(image_tokenizer, text_tokenizer)`"
                    )
                self.width = config.dim or dim
                self.encoder = CaptionEncoder(config, self.width, num_text_tokens, text_seq_len)
            case EmbeddingsConfig():
                if config.width is None:
                    raise ConfigError(
                        "model.condition.width is not known yet: give it, or name the text encoder it comes from"
                    )
                self.width = config.width
            case ClassesConfig():
                self.width = config.width or dim
                self.classes = nn.Embedding(config.num_classes, self.width)
            case NothingConfig():
                self.width = dim
            case _:
                assert_never(config)

    def forward(
        self, text: Int[Tensor, "batch text"], text_mask: Bool[Tensor, "batch text"], extra: Mapping[str, Tensor]
    ) -> Context:
        """The context of a batch.

        Args:
            text: Caption ids, 0 where padded.
            text_mask: True at real tokens.
            extra: Of a `TokenBatch`; `embeddings` reads `text_embeds` and its mask, `classes` reads `labels`.

        Raises:
            DataError: When an entry is missing or has another width; says where it comes from.
        """
        match self.config:
            case CaptionConfig():
                return Context(self.encoder(text, text_mask), text_mask)
            case EmbeddingsConfig():
                states = _entry(extra, TEXT_EMBEDS, "set text_encoder, or tokenize with action=embed")
                mask = _entry(extra, TEXT_EMBEDS_MASK, "it comes with text_embeds")
                if states.shape[-1] != self.width:
                    raise DataError(
                        f"text embeddings of width {states.shape[-1]} for a model with model.condition.width="
                        f"{self.width}; use the text encoder that the model was made for"
                    )
                return Context(states, mask)
            case ClassesConfig():
                labels = _entry(extra, LABELS, "the data set has no labels")
                states = rearrange(self.classes(labels), "b d -> b 1 d")
                return Context(states, torch.ones_like(states[..., 0], dtype=torch.bool))
            case NothingConfig():
                states = torch.zeros(len(text), 1, self.width, device=text.device)
                return Context(states, torch.zeros_like(states[..., 0], dtype=torch.bool))
            case _:
                assert_never(self.config)

    def forward_flops(self) -> float:
        """Floating-point operations of one sample's forward pass."""
        match self.config:
            case CaptionConfig():
                return self.encoder.stack.forward_flops()
            case EmbeddingsConfig() | ClassesConfig() | NothingConfig():
                return 0.0
            case _:
                assert_never(self.config)


class CaptionEncoder(nn.Module):
    """Embedded ids through a bidirectional stack with a final norm. Padding is never seen."""

    def __init__(self, config: CaptionConfig, dim: int, num_text_tokens: int, text_seq_len: int):
        super().__init__()
        self.embedding = nn.Embedding(num_text_tokens, dim)
        options = config.model_dump(exclude={"kind", "dim", "dropout"})
        stack = StackConfig(dim=dim, attn_dropout=config.dropout, ff_dropout=config.dropout, **options)
        self.stack = Stack(stack, TokenLayout(text_seq_len), causal=False)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, text: Int[Tensor, "batch text"], text_mask: Bool[Tensor, "batch text"]
    ) -> Float[Tensor, "batch text dim"]:
        """States of every position; those of padding mean nothing."""
        return self.norm(self.stack(self.embedding(text), key_mask=text_mask))


def _entry(extra: Mapping[str, Tensor], name: str, way_out: str) -> Tensor:
    if name not in extra:
        raise DataError(f"the batch has no {name!r}, which this model is conditioned on; {way_out}")
    return extra[name]
