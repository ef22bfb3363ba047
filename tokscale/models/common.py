"""What the models share: evaluation mode as a context, images as codes, sizes from outside, who scores."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from tokscale.base.batch import LOWRES_CODES, ImageBatch, TokenBatch
from tokscale.base.config import Config
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.protocols import ImageTokenizer
from tokscale.base.rows import Rows
from tokscale.base.shapes import Bool, Float, Int, Tensor, UInt8
from tokscale.nn.conditioning import CaptionConfig, ConditionConfig

C = TypeVar("C", bound=Config)


class HasWidth(Protocol):
    """A text encoder, or states of one that are stored."""

    @property
    def width(self) -> int:
        """Of each state."""
        ...


class Reranker(Protocol):
    """Scores how well images fit their captions; CLIP is one."""

    def score(
        self,
        text: Int[Tensor, "batch text"],
        text_mask: Bool[Tensor, "batch text"],
        pixels: UInt8[Tensor, "batch channels height width"],
    ) -> Float[Tensor, " batch"]:
        """One number per pair, larger where they fit better."""
        ...


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; every submodule gets its own mode back, also after an exception."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, mode in modes:
            child.training = mode


@contextmanager
def drawing(model: nn.Module, seeds: Sequence[int], captions: Sequence[Any] | Tensor) -> Iterator[None]:
    """`evaluating`, entered only when every caption has a seed: how each model's `generate_codes` opens.

    Raises:
        ConfigError: Naming both numbers.
    """
    if len(seeds) != len(captions):
        raise ConfigError(f"{len(seeds)} seeds for {len(captions)} captions; give one seed per caption")
    with evaluating(model):
        yield


def token_batch(batch: ImageBatch, tokenizer: ImageTokenizer, lowres: ImageTokenizer | None = None) -> TokenBatch:
    """Raw images as what the transformers train on, where data was not tokenized beforehand.

    Args:
        batch: Images and captions.
        tokenizer: Makes the codes.
        lowres: Makes low-resolution codes too, of the images scaled to its size: for super-resolution.

    Raises:
        DataError: When the batch has no captions.
    """
    if batch.text is None or batch.text_mask is None:
        raise DataError("images without caption ids cannot train a text-to-image model; give the loader a tokenizer")
    extra = {}
    if lowres is not None:
        small = F.interpolate(batch.pixels, (lowres.image_size, lowres.image_size), mode="nearest")
        extra[LOWRES_CODES] = lowres.encode(small)
    return TokenBatch(
        positions=batch.positions,
        text=batch.text,
        text_mask=batch.text_mask,
        codes=tokenizer.encode(batch.pixels),
        keys=batch.keys,
        extra=extra,
    )


def fit_sizes(config: C, /, key: str = "model", **sizes: tuple[Any, str]) -> C:
    """`config` with sizes that tokenizers dictate.

    Args:
        config: A model's configuration, or a part of it.
        key: Where it stands in the stage's configuration.
        sizes: By field: the value, and what dictates it. A value of None leaves the field alone.

    Raises:
        ConfigError: When a field was given and is another: the key, both values and the way out.
    """
    changes = {}
    for name, (value, source) in sizes.items():
        given = getattr(config, name)
        if given is not None and value is not None and given != value:
            raise ConfigError(f"{key}.{name}: got {given!r}, but the {source} has {value!r}; leave the key out")
        changes[name] = given if value is None else value
    return config.model_copy(update=changes)


def condition_of(config: Config) -> ConditionConfig:
    """What a model is told beside the image; caption ids where its configuration has no `condition`."""
    return getattr(config, "condition", None) or CaptionConfig()


def reads_captions(config: Config) -> bool:
    """Whether a model is told caption ids; one that is told nothing (`condition: null`) has no text tokenizer."""
    return getattr(config, "condition", config) is not None and condition_of(config).reads_captions


def told_rows(config: Any) -> dict[str, tuple[Rows, ...]]:
    """The rows of the table by which a model is told what to draw: of words, or of classes; see `Model.rows`."""
    condition: Any = condition_of(config)
    if condition.reads_labels:
        return {"classes.weight": (Rows("classes", (condition.num_classes,)),)}
    return {"encoder.embedding.weight": (Rows("words", (config.num_text_tokens or 0,)),)}


def fit_condition(config: C, *, encoder: HasWidth | None = None, labels: int | None = None) -> C:
    """`config` with what comes with its captions or classes: the width of a text encoder's states.

    Args:
        config: A model's configuration; left alone when it is told caption ids.
        encoder: Whose states the batches will hold.
        labels: The data set has labels in `[0, labels)`.

    Raises:
        ConfigError: When the width was given and is another, when there is no encoder to tell it, or when the data
            set has no labels or more classes than the model.
    """
    given = condition_of(config)
    fitted = given.fitted(width=None if encoder is None else encoder.width, labels=labels)
    return config if fitted is given else config.model_copy(update={"condition": fitted})
