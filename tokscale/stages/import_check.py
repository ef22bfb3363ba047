"""What an import wrote, measured against what it read: one forward pass of each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokscale.base import rng
from tokscale.base.config import decode
from tokscale.base.errors import CheckpointError
from tokscale.base.shapes import Float, Shaped, Tensor, UInt8
from tokscale.checkpoint.weights import read_config
from tokscale.inference.pretrained import load_pretrained
from tokscale.inference.scorer import load_scorer
from tokscale.models.model import ScoringModel
from tokscale.models.registry import ModelConfig, model_class
from tokscale.tokenizers.codec import FrozenImageTokenizer, ImageCodec
from tokscale.tokenizers.image import load_image_tokenizer

State = Mapping[str, Shaped[Tensor, "..."]]


def model_difference(export: Path, state: State, caption: str, text_encoder: Path | None) -> float | None:
    """The largest difference that one captioned image makes between an export and the weights it was made of.

    Args:
        export: As it was written, in whatever precision.
        state: The weights under our names.
        caption: Of the image.
        text_encoder: Folder of the frozen text encoder, where the model is told its states.

    Returns:
        Of the losses and their parts, or of a score; None for a model that needs images of two resolutions.
    """
    config: Any = decode(ModelConfig, read_config(export), where=str(export), refuse=CheckpointError)
    if getattr(config, "lowres", None) is not None:
        return None
    if issubclass(model_class(config), ScoringModel):
        scorer = load_scorer(export)
        pixels = _noise(config.channels, config.visual_image_size)
        model, measure = scorer.model, lambda: scorer.score([caption], pixels)
    else:
        pretrained = load_pretrained(export, text_encoder=text_encoder)
        tokenizer = pretrained.image_tokenizer
        pixels = _noise(tokenizer.channels, tokenizer.image_size)
        (batch,) = pretrained.batches([caption], pixels, 1)
        model, measure = pretrained.model, lambda: _losses(pretrained.model, batch)
    written = _drawn_alike(measure)
    model.float().load_state_dict(state)
    return (_drawn_alike(measure) - written).abs().max().item()


def tokenizer_difference(folder: Path, codec: ImageCodec) -> float:
    """The largest difference between images that a written tokenizer decodes and those of the network it was made of.

    Raises:
        CheckpointError: When the two give one image other codes.
    """
    written, read = load_image_tokenizer(folder), FrozenImageTokenizer(codec)
    pixels = _noise(read.channels, read.image_size)
    codes = read.encode(pixels)
    if not codes.equal(written.encode(pixels)):
        raise CheckpointError(f"{folder}: gives other codes than the weights it was made of; import it again")
    return (read.decode(codes).float() - written.decode(codes).float()).abs().max().item()


def _losses(model: Any, batch: Any) -> Float[Tensor, " parts"]:
    found = model(batch)
    return torch.stack([found.total, *found.parts.values()]).float()


def _drawn_alike(measure: Any) -> Float[Tensor, " parts"]:
    with torch.no_grad(), rng.scope(0, "import"):
        return measure()


def _noise(channels: int, size: int) -> UInt8[Tensor, "1 channels size size"]:
    drawn = torch.randint(0, 256, (1, channels, size, size), generator=rng.generator(0, "import"))
    return drawn.to(torch.uint8)
