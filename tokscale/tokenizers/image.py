"""The image tokenizers by name: build one, save one, load one from its folder."""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import PositiveInt

from tokscale.base.config import Config, decode, encode, kind_of
from tokscale.base.errors import DataError
from tokscale.base.files import read_json, write_json
from tokscale.base.formats import upgrade
from tokscale.base.registry import ConfigOf, Registry, admitted
from tokscale.tokenizers.codec import FrozenImageTokenizer, ImageCodec, Precision
from tokscale.tokenizers.dvae.model import DiscreteVAE
from tokscale.tokenizers.pretrained.diffusers_vq import DiffusersVQ
from tokscale.tokenizers.pretrained.openai_dvae import OpenAIDiscreteVAE
from tokscale.tokenizers.pretrained.taming import TamingVQGAN
from tokscale.tokenizers.pretrained.torchscript import TorchScriptTokenizer
from tokscale.tokenizers.vqgan.model import VQGAN


def _admitted(name: str, offered: Any) -> type[ImageCodec]:
    """A codec class, if that is what a package offers.

    Raises:
        TypeError: When it lacks a part, or its configuration has another kind than its name.
    """
    parts = ("version", "anneal", "train_flops") if getattr(offered, "is_trainable", False) else ("version",)
    return admitted(name, offered, ImageCodec, parts, {"config_class": False})


IMAGE_TOKENIZERS: Registry[type[ImageCodec]] = Registry("tokenizer.kind", group="tokscale.tokenizers", admit=_admitted)
"""By the `kind` of their configuration. Installed packages add theirs."""
for _codec in (DiscreteVAE, VQGAN, TamingVQGAN, OpenAIDiscreteVAE, TorchScriptTokenizer, DiffusersVQ):
    IMAGE_TOKENIZERS.add(kind_of(_codec.config_class), _admitted(kind_of(_codec.config_class), _codec))


def _config_class(codec: type[ImageCodec]) -> type[Config]:
    return codec.config_class


def is_trainable(codec: type[ImageCodec]) -> bool:
    """Whether `train-tokenizer` can train it."""
    return codec.is_trainable


def _is_published(codec: type[ImageCodec]) -> bool:
    return "from_original" in vars(codec)


ImageTokenizerConfig = Annotated[Config, ConfigOf(IMAGE_TOKENIZERS, _config_class)]
"""Configuration of any image tokenizer, discriminated by `kind`."""

TrainableConfig = Annotated[Config, ConfigOf(IMAGE_TOKENIZERS, _config_class, is_trainable)]
"""Configuration of those that are trained here."""

PretrainedConfig = Annotated[Config, ConfigOf(IMAGE_TOKENIZERS, _config_class, _is_published)]
"""Configuration of those whose weights others published."""


_SIZE = "image_hw"


def codec_class(config: Config) -> type[ImageCodec]:
    """The network class of a configuration."""
    return next(codec for codec in IMAGE_TOKENIZERS.usable().values() if codec.config_class is type(config))


def import_image_tokenizer(config: PretrainedConfig, source: Path | str, folder: Path | str) -> FrozenImageTokenizer:
    """Turn published weights into a tokenizer folder of ours, once.

    Args:
        config: Describes the network; `configs/tokenizer/` has those of the published checkpoints.
        source: What was downloaded: a checkpoint file (`taming`), or a folder with `encoder.pkl` and `decoder.pkl`
            (`openai_dvae`), `encoder.jit` and `decoder.jit` (`torchscript`), or a diffusers model (`diffusers_vq`).
        folder: Receives the tokenizer.

    Raises:
        CheckpointError: When files are missing, unreadable, or hold another network than `config` describes.
        StorageError: When the file system refuses.
    """
    codec = codec_class(config).from_original(config, source)
    save_image_tokenizer(codec, folder)
    return FrozenImageTokenizer(codec)


def save_image_tokenizer(tokenizer: ImageCodec | FrozenImageTokenizer, folder: Path | str) -> None:
    """Write the weights and then `config.json`, so that a folder with one is whole.

    `config.json` is the network's configuration, with `image_hw` for one that was resized.

    Raises:
        StorageError: When the file system refuses.
    """
    codec = tokenizer.codec if isinstance(tokenizer, FrozenImageTokenizer) else tokenizer
    codec.save_weights(Path(folder))
    size = {} if codec.image_hw == (codec.image_size, codec.image_size) else {_SIZE: codec.image_hw}
    write_json(Path(folder) / "config.json", encode(codec.config) | size)


def load_image_tokenizer(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    image_size: int | None = None,
) -> FrozenImageTokenizer:
    """The image tokenizer that was exported to `folder`.

    Args:
        folder: Holds `config.json` and the weights.
        device: Where to encode and decode.
        precision: Arithmetic of the convolutions. Part of the fingerprint, since it changes ids.
        image_size: Side of the images, where it is not the one that the tokenizer was trained with: a convolutional
            network reads others, too, and gives a grid in proportion. Part of the fingerprint.

    Raises:
        DataError: When the folder or its configuration is missing, or names an unknown kind or option.
        ConfigError: When it does not allow this size.
        CheckpointError: When the weights are missing, damaged, or of another network.
    """
    described = Path(folder) / "config.json"
    if not described.is_file():
        raise DataError(
            f"{folder}: no config.json, so this is no image tokenizer; give the folder that train-tokenizer "
            "or import wrote"
        )
    values = upgrade("tokenizer", read_json(described))
    size = values.pop(_SIZE, None)
    if size is not None:
        size = decode(tuple[PositiveInt, PositiveInt], size, where=f"{described}, {_SIZE}", refuse=DataError)
    config = decode(ImageTokenizerConfig, values, where=str(described), refuse=DataError)
    if image_size is not None:  # a size that does not fit is the caller's mistake, not the folder's
        config, size = decode(ImageTokenizerConfig, values | {"image_size": image_size}, where=str(folder)), None
    codec = codec_class(config).from_folder(config, Path(folder))
    codec = codec if size is None else codec.resized((size[0], size[1]))
    return FrozenImageTokenizer(codec, precision=precision).to(device)
