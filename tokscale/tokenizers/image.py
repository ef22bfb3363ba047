"""The image tokenizers by name: build one, save one, load one from its folder."""

import json
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tokscale.base.config import decode, encode
from tokscale.base.errors import CheckpointError, DataError
from tokscale.base.files import atomic_write, read_json, write_json
from tokscale.tokenizers.codec import FrozenImageTokenizer, ImageCodec, Precision
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.dvae.model import DiscreteVAE
from tokscale.tokenizers.fingerprint import weights_sha256

ImageTokenizerConfig = Annotated[DiscreteVAEConfig, Field()]
"""Configuration of any image tokenizer, told apart by `kind`."""


def build_image_codec(config: ImageTokenizerConfig) -> ImageCodec:
    """The network of a configuration, with fresh weights."""
    return DiscreteVAE(config)


def save_image_tokenizer(tokenizer: ImageCodec | FrozenImageTokenizer, folder: Path | str) -> None:
    """Write `config.json` and `model.safetensors`; the configuration last, so that a folder with one is whole.

    Raises:
        StorageError: When the file system refuses.
    """
    codec = tokenizer.codec if isinstance(tokenizer, FrozenImageTokenizer) else tokenizer
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in codec.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as file:
        file.write(save(tensors, {"format": "pt", "sha256": weights_sha256(tensors)}))
    write_json(folder / "config.json", encode(codec.config))


def load_image_tokenizer(
    folder: Path | str, *, device: torch.device | str = "cpu", precision: Precision = "fp32"
) -> FrozenImageTokenizer:
    """The image tokenizer that was exported to `folder`.

    Args:
        folder: Holds `config.json` and `model.safetensors`.
        device: Where to encode and decode.
        precision: Arithmetic of the convolutions. Part of the fingerprint, since it changes ids.

    Raises:
        DataError: When the folder or its configuration is missing.
        ConfigError: When the configuration names an unknown kind or option.
        CheckpointError: When the weights are missing, damaged, or of another network.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{folder}: no config.json, so this is no image tokenizer; give the folder that train-tokenizer "
            "or an import wrote"
        )
    config = decode(ImageTokenizerConfig, read_json(folder / "config.json"), where=str(folder / "config.json"))
    codec = build_image_codec(config)
    tensors = read_weights(folder / "model.safetensors")
    load_strictly(codec, tensors, folder / "model.safetensors")
    return FrozenImageTokenizer(codec, precision=precision).to(device)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, checked against the hash that `save_image_tokenizer` stored beside them.

    Raises:
        CheckpointError: When the file is missing, damaged or altered.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            expected = (file.metadata() or {}).get("sha256")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the folder is incomplete, export the tokenizer again") from None
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); export it again") from error
    if expected is not None and expected != weights_sha256(tensors):
        raise CheckpointError(f"{path}: the weights do not match their sha256 {expected[:12]}; the file was damaged")
    return tensors


def load_strictly(codec: ImageCodec, tensors: dict[str, Tensor], path: Path) -> None:
    """Load exactly the tensors a codec has.

    Raises:
        CheckpointError: Listing what is missing, unknown, or of another shape.
    """
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
        raise CheckpointError(f"{path}: {len(problems)} tensors do not fit {codec.config.kind!r}: {shown}")
    codec.load_state_dict(tensors)
