"""A trained model from an export folder, ready to sample: no engine, no launcher, no Hydra."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokscale.base.config import Config, decode, encode
from tokscale.base.protocols import ImageTokenizer, TextTokenizer
from tokscale.base.rng import seed_of
from tokscale.base.shapes import Tensor, UInt8
from tokscale.checkpoint.export import ExportOptions, write_export
from tokscale.checkpoint.hub import HubMixin
from tokscale.checkpoint.weights import load_weights, read_config
from tokscale.models.registry import ModelConfig, build_model
from tokscale.tokenizers.image import load_image_tokenizer
from tokscale.tokenizers.text import load_text_tokenizer


@dataclass(frozen=True)
class Pretrained(HubMixin):
    """What an export holds."""

    folder: Path
    config: Config
    model: Any
    """A module that is a `base.protocols.GenerativeModel`."""
    image_tokenizer: ImageTokenizer
    text_tokenizer: TextTokenizer
    device: torch.device

    def sample(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        **options: Any,
    ) -> UInt8[Tensor, "prompts channels height width"]:
        """Draw one picture for each prompt.

        Args:
            prompts: Captions.
            seed: Base of the per-picture seeds when those are not given; prompt `i` then draws from its own stream.
            seeds: One seed a picture: the same prompt and seed draw the same noise in any batch.
            batch_size: Pictures sampled together.
            options: Fields of the model's sampling configuration, e.g. `temperature=0.9, cond_scale=3`.

        Raises:
            ConfigError: When an option is unknown or out of range.
        """
        sampling = decode(self.model.sampling_config, options, where="sampling")
        seeds = list(seeds) if seeds is not None else [seed_of(seed, "sample", i) for i in range(len(prompts))]
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many seeds; got {len(seeds)}")
        pictures = []
        for at in range(0, len(prompts), batch_size):
            text, mask = self.text_tokenizer.encode(prompts[at : at + batch_size], self.model.text_seq_len)
            codes = self.model.generate_codes(
                text.to(self.device), mask.to(self.device), options=sampling, seeds=seeds[at : at + batch_size]
            )
            pictures.append(self.image_tokenizer.decode(codes).cpu())
        return torch.cat(pictures)

    def _save_pretrained(self, save_directory: Path, *, max_shard_size: int) -> None:
        with torch.device("meta"):
            meta_model = build_model(self.config)
        beside = {name: self.folder / name for name in ("image_tokenizer", "text_tokenizer", "README.md")}
        write_export(
            save_directory,
            meta_model=meta_model,
            model_config=encode(self.config),
            state_dict=self.model.state_dict(),
            options=ExportOptions(
                dtype="stored",
                max_shard_size=max_shard_size,
                extras={name: path for name, path in beside.items() if path.exists()},
            ),
        )

    @classmethod
    def _from_pretrained(cls, folder: Path, **options: Any) -> "Pretrained":
        return load(folder, **options)


def load(folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Pretrained:
    """Load an export.

    Args:
        folder: Written by `tokscale export`: config, weights and both tokenizers.
        device: Where to put the model and the image tokenizer.
        dtype: Of the model's weights; by default as stored.

    Raises:
        CheckpointError: When a file is missing or does not fit the configuration.
    """
    folder, device = Path(folder), torch.device(device)
    config = decode(ModelConfig, read_config(folder), where="config.json")
    model = build_model(config)
    load_weights(model, folder, as_stored=dtype is None)
    return Pretrained(
        folder=folder,
        config=config,
        model=model.to(device=device, dtype=dtype).eval().requires_grad_(False),
        image_tokenizer=load_image_tokenizer(folder / "image_tokenizer", device=device),
        text_tokenizer=load_text_tokenizer(folder / "text_tokenizer"),
        device=device,
    )
