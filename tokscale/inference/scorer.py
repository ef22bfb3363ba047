"""How well images fit captions: a CLIP from its export, to rank samples and to measure them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokscale.base.config import decode, kind_of
from tokscale.base.errors import CheckpointError, ConfigError
from tokscale.base.protocols import TextTokenizer
from tokscale.base.shapes import Float, Tensor, UInt8
from tokscale.checkpoint.hub import HubMixin
from tokscale.checkpoint.weights import load_weights, read_config, require_fit
from tokscale.data.raw.images import centre_square, with_channels
from tokscale.inference.saving import save_again
from tokscale.models.common import evaluating
from tokscale.models.model import ScoringModel
from tokscale.models.registry import MODELS, ModelConfig, build_model, model_class
from tokscale.tokenizers.text import load_text_tokenizer

_TOGETHER = 256


@dataclass(frozen=True, repr=False)
class Scorer(HubMixin):
    """What the export of a model holds that scores images, as CLIP does."""

    folder: Path
    config: Any
    """Says the image size and the width of captions; see `models.model.Model.reads`."""
    model: ScoringModel
    text_tokenizer: TextTokenizer
    device: torch.device

    def __repr__(self) -> str:
        """What it is and where it came from, on one line; the network is `model`."""
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        return f"Scorer({kind_of(self.config)}, {millions:.1f}M parameters, {str(self.folder)!r}, {self.device})"

    def encode_captions(self, captions: Sequence[str]) -> Float[Tensor, "captions latent"]:
        """Unit vectors of captions, on the CPU."""
        text, mask = self.text_tokenizer.encode(captions, self.config.text_seq_len)
        with evaluating(self.model):
            parts = [
                self.model.encode_text(ids.to(self.device), real.to(self.device)).float().cpu()
                for ids, real in zip(text.split(_TOGETHER), mask.split(_TOGETHER), strict=True)
            ]
        return torch.cat(parts)

    def encode_images(self, pixels: UInt8[Tensor, "images channels height width"]) -> Float[Tensor, "images latent"]:
        """Unit vectors of images of any size, of which CLIP sees the centre square; on the CPU."""
        size = self.config.visual_image_size
        assert size is not None, "an export has its sizes"
        if tuple(pixels.shape[1:]) != (self.config.channels, size, size):
            pixels = torch.stack([with_channels(centre_square(p, size), self.config.channels) for p in pixels.cpu()])
        with evaluating(self.model):
            parts = [self.model.encode_image(p.to(self.device)).float().cpu() for p in pixels.split(_TOGETHER)]
        return torch.cat(parts)

    def score(
        self, captions: Sequence[str], pixels: UInt8[Tensor, "captions channels height width"]
    ) -> Float[Tensor, " captions"]:
        """The cosine of each image with its own caption, -1 to 1."""
        return (self.encode_captions(captions) * self.encode_images(pixels)).sum(-1)

    def _save_pretrained(self, save_directory: Path, *, max_shard_size: int) -> None:
        save_again(
            save_directory,
            config=self.config,
            model=self.model,
            source=self.folder,
            beside=("text_tokenizer", "README.md"),
            max_shard_size=max_shard_size,
        )

    @classmethod
    def _from_pretrained(cls, folder: Path, **options: Any) -> "Scorer":
        return load_scorer(folder, **options)


def load_scorer(folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Scorer:
    """Load the export of a model that scores images.

    Args:
        folder: Written by `tokscale export` or `tokscale import`.
        device: Where to put the model.
        dtype: Of the model's weights; by default as stored.

    Raises:
        CheckpointError: When a file is missing or does not fit the configuration.
        ConfigError: When the export is of another kind of model.
    """
    folder, device = Path(folder), torch.device(device)
    config = decode(ModelConfig, read_config(folder), where=str(folder / "config.json"), refuse=CheckpointError)
    if not issubclass(model_class(config), ScoringModel):
        scoring = [f"a {known.__name__}" for known in MODELS.usable().values() if issubclass(known, ScoringModel)]
        raise ConfigError(
            f"{folder}: holds a model of kind {kind_of(config)!r}; only {' or '.join(scoring)} scores images"
        )
    require_fit(lambda: build_model(config), folder)
    model: Any = build_model(config)
    load_weights(model, folder, as_stored=dtype is None)
    return Scorer(
        folder=folder,
        config=config,
        model=model.to(device=device, dtype=dtype).eval().requires_grad_(False),
        text_tokenizer=load_text_tokenizer(folder / "text_tokenizer"),
        device=device,
    )
