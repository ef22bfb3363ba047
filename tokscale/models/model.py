"""What every model says about itself, so that no stage has to know its name."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from torch import nn

from tokscale.base.batch import LossOutput
from tokscale.base.config import Config, kind_of
from tokscale.base.errors import ConfigError
from tokscale.base.rows import Rows
from tokscale.base.shapes import Bool, Float, Int, Tensor, UInt8


class AnyModelConfig(Config):
    """Base of the configurations of models. A subclass has a `kind` of its own, by which YAML asks for it."""

    def fitted(self, image: Any, text: Any) -> Self:
        """This configuration with its sizes taken from the tokenizers.

        Args:
            image: The image tokenizer (`base.protocols.ImageTokenizer`); None where a model of images is given none.
            text: The text tokenizer (`base.protocols.TextTokenizer`); None for a model that reads no caption ids.

        Raises:
            ConfigError: When a size was given and is another.
        """
        del image, text
        return self

    def with_grids(self, grids: Sequence[tuple[int, int]]) -> Self:
        """This configuration, fitted, for images of several shapes.

        Args:
            grids: Rows and columns of codes of each; the first is drawn where no size is asked for.

        Raises:
            ConfigError: Unless the model can read several.
        """
        shapes = ", ".join(f"{rows} x {columns}" for rows, columns in grids)
        raise ConfigError(
            f"model.kind={kind_of(self)} trains on one shape of images, and the data have codes of {shapes}; read one "
            "bucket: data.sources=[{path: FOLDER, buckets: [NAME]}]"
        )


ReadBy = Literal["codes", "images"]


class Model(nn.Module, ABC):
    """A module that stages can train, export and load. It is made from its configuration alone: `Model(config)`."""

    config_class: ClassVar[type[AnyModelConfig]]
    """The configuration that it is made from."""
    reads: ClassVar[ReadBy] = "codes"
    """What it trains on: token shards (`TokenBatch`), or images themselves (`ImageBatch`). The configuration of one of
    images has `visual_image_size`, `channels` and `text_seq_len`."""
    reads_soft_codes: ClassVar[bool] = False
    """Whether its loss takes distributions of codes as targets."""
    hub_task: ClassVar[str]
    """What model hubs call its task."""
    example: ClassVar[str]
    """A line of Python that uses a loaded export, named `model`."""
    command: ClassVar[str]
    """A command that uses an export at `{export}`; empty for a model that does nothing by itself."""

    @abstractmethod
    def forward(self, batch: Any) -> LossOutput:
        """The loss of a batch; all parameters are read inside it."""

    @abstractmethod
    def train_flops(self) -> float:
        """Floating-point operations of forward and backward for one sample (a multiply-add is two)."""

    def rows(self) -> dict[str, tuple[Rows, ...]]:
        """What the rows of its weights stand for, where they depend on vocabularies, grids or caption lengths.

        A model that says nothing takes over weights of equal shapes alone.
        """
        return {}

    def anneal(self, step: int) -> None:
        """Set what is scheduled by training progress for optimizer step `step`; nothing, unless a model says so."""
        del step


class GenerativeModel(Model):
    """A model that draws image codes for captions, one seed an image."""

    sampling_config: ClassVar[type[Config]]
    """What `options` are: how to draw, in the model's own terms."""
    parallel_decoding: ClassVar[bool] = False
    """Whether `generate_codes` looks at whole images a few times, as often and in the same order of modules whatever
    the batch. Such a model is drawn from while its weights stay sharded; one that draws code after code would gather
    every layer for each code."""
    hub_task = "text-to-image"
    example = 'images = model.sample(["a small red circle"])'
    command = "tokscale sample export={export}"

    @property
    @abstractmethod
    def text_seq_len(self) -> int:
        """Width of the caption ids it reads."""

    @abstractmethod
    def generate_codes(
        self,
        text: Int[Tensor, "batch text"],
        text_mask: Bool[Tensor, "batch text"],
        *,
        options: Any,
        seeds: Sequence[int],
        extra: Mapping[str, Tensor] | None = None,
    ) -> Int[Tensor, "batch *code_shape"]:
        """The same caption and seed draw the same noise in whatever batch they stand.

        `extra` is that of a `TokenBatch`: what the model is told beside caption ids. A model that needs an entry names
        it in the error; one that needs none ignores it. A model that has drawn several grids in training
        (`AnyModelConfig.with_grids`) also takes `grid=(rows, columns)`, by default the first of them.
        """


class ScoringModel(Model):
    """A model that puts captions and images into one space, to score how well they fit."""

    reads = "images"
    hub_task = "zero-shot-image-classification"
    example = "fits = model.score(captions, images)  # one cosine a pair"
    command = ""

    @abstractmethod
    def encode_text(
        self, text: Int[Tensor, "batch text"], text_mask: Bool[Tensor, "batch text"]
    ) -> Float[Tensor, "batch latent"]:
        """Unit vectors of captions."""

    @abstractmethod
    def encode_image(self, pixels: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch latent"]:
        """Unit vectors of images of the model's size."""
