"""What every image tokenizer network offers, and the frozen form in which models and stages use it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import nn

from tokscale.base.config import Config
from tokscale.base.errors import CheckpointError, ConfigError, DataError
from tokscale.base.kinds import for_each
from tokscale.base.modules import trial_build
from tokscale.base.shapes import Float, Int, Shaped, Tensor, UInt8
from tokscale.tokenizers.fingerprint import tokenizer_fingerprint, weights_sha256
from tokscale.tokenizers.weights_file import WEIGHTS, read_weights, write_weights

Precision = Literal["fp32", "tf32", "bf16"]
"""Arithmetic of convolutions: exact, or the tensor cores' (on CUDA), or autocast to bfloat16."""
ALLOWED = for_each(Precision, {"fp32": (False, False), "tf32": (True, False), "bf16": (False, True)})
"""Whether products may be taken in TF32, and whether bfloat16 is cast to."""


class Opponent(NamedTuple):
    """A discriminator that a codec is trained against; the codec's `adversary` is then set in each step."""

    make: Callable[[], nn.Module]
    """As `vqgan.discriminator.Discriminator`: a loss of `ImagePairBatch`, `score` and `generator_loss`."""
    start_step: int
    """From which optimizer step it counts."""


class ImageCodec(nn.Module, ABC):
    """A network that turns images into codes and back.

    Encoding has two halves so that only the first may run in low precision: at 16384 codes the distances of the
    second lose their minimum in half precision.
    """

    config_class: ClassVar[type[Config]]
    """The configuration that it is made from; its `kind` is the name that folders and YAML know it by."""
    is_trainable: ClassVar[bool] = False
    """Whether `train-tokenizer` can train it: `forward` maps an `ImageBatch` to its loss, with `anneal` and
    `train_flops` as in `base.protocols.LossModel`."""
    version: ClassVar[str]
    """Name and revision of this arithmetic, part of the fingerprint."""
    config: Any
    """The configuration that rebuilds the network; has a `kind`."""
    num_tokens: int
    image_size: int
    channels: int
    code_shape: tuple[int, ...]
    any_size: bool = True
    """Whether it reads images of other sides than it was made for, as convolutions do."""
    _resized: tuple[int, int] | None = None

    @property
    def image_hw(self) -> tuple[int, int]:
        """Rows and columns of its images, in pixels: a square of `image_size`, unless it was `resized`."""
        return self._resized or (self.image_size, self.image_size)

    @property
    def reduction(self) -> int:
        """Pixels per code along a side."""
        return min(self.image_hw) // min(self.code_shape[:2])

    def resized(self, size: tuple[int, int]) -> Self:
        """This network for images of other rows and columns; the weights are shared.

        Raises:
            ConfigError: When it reads one size only, or its grid would not be whole.
        """
        if size == self.image_hw:
            return self
        if not self.any_size:
            raise ConfigError(
                f"images of {shown_size(size)} for an image tokenizer that knows the places of "
                f"{shown_size(self.image_hw)} only; take a convolutional one"
            )
        if any(side < 1 or side % self.reduction for side in size):
            raise ConfigError(
                f"images of {shown_size(size)}: this image tokenizer has a code for every {self.reduction} x "
                f"{self.reduction} pixels; give multiples of {self.reduction}"
            )
        other = copy(self)
        other._resized = size
        other.code_shape = (size[0] // self.reduction, size[1] // self.reduction, *self.code_shape[2:])
        return other

    def prepare_training(self, device: torch.device) -> None:
        """Read what training needs beside the weights, such as a perceptual loss; nothing, unless a codec says so.

        Raises:
            CheckpointError: When it cannot be read.
        """
        del device

    def opponent(self) -> Opponent | None:
        """What it is trained against; nothing, unless a codec says so."""
        return None

    @classmethod
    def published(cls, config: Any) -> Any:
        """Its configuration as a folder holds it: without paths of the machine it was trained on, where it has any."""
        return config

    @abstractmethod
    def fingerprint_fields(self) -> dict[str, Any]:
        """The JSON-ready settings which, beside the weights, decide the ids."""

    @abstractmethod
    def features(
        self, pixels: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch width grid_h grid_w"]:
        """What is quantized, from images in [0, 1]."""

    @abstractmethod
    def quantize(self, features: Float[Tensor, "batch width grid_h grid_w"]) -> Int[Tensor, "batch *code_shape"]:
        """Codes of fp32 features: deterministic, no noise."""

    @abstractmethod
    def decode_to_unit_range(
        self, codes: Int[Tensor, "batch *code_shape"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Images in [0, 1]; values a little outside are cut by the caller."""

    def content_sha256(self) -> str:
        """Hash of the weights, part of the fingerprint."""
        return weights_sha256(self.state_dict())

    def save_weights(self, folder: Path) -> None:
        """Write the weights that `from_folder` reads."""
        write_weights(folder, self.state_dict())

    @classmethod
    def from_original(cls, config: Any, source: Path | str) -> Self:
        """The network of a configuration with weights that others published, from their own files.

        Raises:
            CheckpointError: When files are missing, unreadable, or hold another network than `config` describes.
        """
        raise ConfigError(f"tokenizer.kind={config.kind}: no published weights of it are known; train it")

    @classmethod
    def from_folder(cls, config: Any, folder: Path) -> Self:
        """The network of a configuration with the weights in `folder`.

        Raises:
            CheckpointError: When the weights are missing, damaged, or of another network.
        """
        return cls.with_weights(config, read_weights(folder), folder / WEIGHTS)

    @classmethod
    def with_weights(cls, config: Any, tensors: Mapping[str, Tensor], path: Path | str) -> Self:
        """The network of a configuration with exactly these tensors, in fp32. `path` is named in errors.

        Raises:
            CheckpointError: Listing tensors that are missing, unknown, or of another shape.
        """
        with trial_build(f"{path}: its configuration", len(tensors), CheckpointError):  # takes no memory
            codec = cls(config)
        own = codec.state_dict()
        problems = [f"missing {name}" for name in own.keys() - tensors.keys()]
        problems += [f"unknown {name}" for name in tensors.keys() - own.keys()]
        problems += [
            f"{name} has shape {tuple(tensors[name].shape)}, the configuration says {tuple(own[name].shape)}"
            for name in own.keys() & tensors.keys()
            if own[name].shape != tensors[name].shape
        ]
        if problems:
            shown = "; ".join(sorted(problems)[:8])
            raise CheckpointError(f"{path}: {len(problems)} tensors do not fit {config.kind!r}: {shown}")
        codec.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        return codec

    @torch.no_grad()
    def encode(
        self, pixels: UInt8[Tensor, "batch channels height width"], precision: Precision = "fp32"
    ) -> Int[Tensor, "batch *code_shape"]:
        """Codes of images.

        Args:
            pixels: Images of this tokenizer's size and channels, 0 to 255.
            precision: Arithmetic of the convolutions; quantization is always exact fp32.

        Raises:
            DataError: When the images have another dtype, size or number of channels.
        """
        self.check_pixels(pixels)
        with arithmetic(pixels.device, precision):
            features = self.features(pixels.to(torch.float32) / 255)
        with arithmetic(pixels.device, "fp32"):
            return self.quantize(features.float())

    @torch.no_grad()
    def decode(
        self, codes: Int[Tensor, "batch *code_shape"], precision: Precision = "fp32"
    ) -> UInt8[Tensor, "batch channels height width"]:
        """Images of codes, 0 to 255.

        Raises:
            DataError: When the codes have another shape or lie outside the vocabulary.
        """
        if codes.shape[1:] != self.code_shape:
            raise DataError(f"codes of shape {tuple(codes.shape[1:])} given to a tokenizer of {self.code_shape}")
        low, high = torch.stack(codes.aminmax()).tolist() if codes.numel() else (0, 0)  # a GPU is waited for once
        if not 0 <= low <= high < self.num_tokens:
            raise DataError(f"codes from {low} to {high} given to a tokenizer of {self.num_tokens} codes")
        with arithmetic(codes.device, precision):
            return to_uint8(self.decode_to_unit_range(codes))

    def check_pixels(self, pixels: Shaped[Tensor, "..."]) -> None:
        """Refuse images that are not 8-bit, or not of this tokenizer's size.

        Raises:
            DataError: Naming both shapes.
        """
        expected = (self.channels, *self.image_hw)
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != expected:
            raise DataError(
                f"images of shape {tuple(pixels.shape[1:])} and type {pixels.dtype} given to a tokenizer that takes "
                f"{expected} and torch.uint8; set image_size and channels of the data to the tokenizer's"
            )


class FrozenImageTokenizer:
    """A codec that is used and never trained: `base.protocols.ImageTokenizer`.

    Deliberately no `nn.Module`: a model that holds one neither trains, decays, moves nor saves it, and its own
    `train()` cannot switch it out of evaluation mode.
    """

    def __init__(self, codec: ImageCodec, *, precision: Precision = "fp32"):
        """Take `codec` over: it is put into evaluation mode, and its parameters stop requiring gradients."""
        self.codec = codec.eval().requires_grad_(False)
        self.precision: Precision = precision
        self.device = next((parameter.device for parameter in codec.parameters()), torch.device("cpu"))
        self.num_tokens = codec.num_tokens
        self.image_size = min(codec.image_hw)
        self.image_hw = codec.image_hw
        self.channels = codec.channels
        self.code_shape = codec.code_shape
        identity = codec.fingerprint_fields() | _size_fields(codec) | {"precision": precision}
        self.fingerprint = tokenizer_fingerprint(codec.version, identity, codec.content_sha256())

    @property
    def config(self) -> Config:
        """The configuration that rebuilds the codec."""
        return self.codec.config

    def to(self, device: torch.device | str) -> Self:
        """Move the weights; returns itself."""
        self.device = torch.device(device)
        self.codec.to(device)
        return self

    def resized(self, size: tuple[int, int]) -> "FrozenImageTokenizer":
        """This tokenizer for images of other rows and columns, under another fingerprint; the weights are shared.

        Raises:
            ConfigError: See `ImageCodec.resized`.
        """
        codec = self.codec.resized(size)
        return self if codec is self.codec else FrozenImageTokenizer(codec, precision=self.precision)

    def matching(self, fingerprint: str, code_shape: Sequence[int]) -> "FrozenImageTokenizer":
        """This tokenizer for the image size at which its fingerprint is that one; itself when there is none.

        Args:
            fingerprint: Of whoever made some codes.
            code_shape: Of these codes.
        """
        if self.fingerprint == fingerprint or not self.codec.any_size:
            return self
        rows, columns, *_ = code_shape
        fitted = self.resized((rows * self.codec.reduction, columns * self.codec.reduction))
        return fitted if fitted.fingerprint == fingerprint else self

    def encode(self, pixels: UInt8[Tensor, "batch channels height width"]) -> Int[Tensor, "batch *code_shape"]:
        """Codes of images, on the tokenizer's device. See `ImageCodec.encode`."""
        with torch.inference_mode():
            codes = self.codec.encode(pixels.to(self.device), self.precision)
        return codes.clone()  # outside inference mode: a model may use them as embedding indices under autograd

    def decode(self, codes: Int[Tensor, "batch *code_shape"]) -> UInt8[Tensor, "batch channels height width"]:
        """Images of codes, on the tokenizer's device. See `ImageCodec.decode`."""
        with torch.inference_mode():
            pixels = self.codec.decode(codes.to(self.device), self.precision)
        return pixels.clone()


def _size_fields(codec: ImageCodec) -> dict[str, Any]:
    """What resizing changes of a codec's identity: for a square, just what a network made for it would say."""
    rows, columns = codec.image_hw
    if rows != columns:
        return {"picture_size": codec.image_hw}  # the word of format 1: it enters fingerprints
    changed = {"image_size": rows, "code_shape": codec.code_shape}
    return {name: value for name, value in changed.items() if name in codec.fingerprint_fields()}


def shown_size(size: tuple[int, int]) -> str:
    """Rows and columns as people say them, the width first."""
    return f"{size[1]}x{size[0]}"


def to_uint8(pixels: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Images in [0, 1] as bytes: cut first, so that nothing wraps around."""
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)


@contextmanager
def arithmetic(device: torch.device, precision: Precision) -> Iterator[None]:
    """Compute in exactly this precision inside, whatever the caller has allowed for its own training."""
    tf32, matmul = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    allowed, cast = ALLOWED[precision]
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cast):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision(matmul)
