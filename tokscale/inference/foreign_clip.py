"""A CLIP of the transformers library from a local folder, to measure images and captions with as with our own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokscale.base.errors import CheckpointError, EnvironmentRefused
from tokscale.base.files import read_json
from tokscale.base.shapes import Float, Tensor, UInt8
from tokscale.data.raw.images import centre_square, with_channels
from tokscale.inference.scorer import Scorer, load_scorer
from tokscale.tokenizers.stored_buffers import refuse_unread

_TOGETHER = 64
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the images that OpenAI's CLIP was trained on; a folder's `preprocessor_config.json` may say others."""


@dataclass(frozen=True)
class ForeignClip:
    """What measures need of a CLIP: unit vectors of captions and of images."""

    folder: Path
    model: Any
    tokenizer: Any
    device: torch.device
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.inference_mode()
    def encode_captions(self, captions: Sequence[str]) -> Float[Tensor, "captions latent"]:
        """Unit vectors of captions, on the CPU; longer ones are cut to the model's length."""
        length = self.model.config.text_config.max_position_embeddings
        found = []
        for at in range(0, len(captions), _TOGETHER):
            told = self.tokenizer(
                list(captions[at : at + _TOGETHER]),
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(self.device)
            pooled = self.model.text_model(told["input_ids"], attention_mask=told["attention_mask"]).pooler_output
            found.append(self.model.text_projection(pooled).float().cpu())
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)

    @torch.inference_mode()
    def encode_images(self, pixels: UInt8[Tensor, "images channels height width"]) -> Float[Tensor, "images latent"]:
        """Unit vectors of images of any size, of which it sees the centre square, scaled; on the CPU."""
        side, found = self.model.config.vision_config.image_size, []
        mean, std = (torch.tensor(x, device=self.device).view(1, 3, 1, 1) for x in (self.mean, self.std))
        for part in pixels.split(_TOGETHER):
            square = torch.stack([with_channels(centre_square(image, side), 3) for image in part.cpu()])
            seen = self.model.vision_model(pixel_values=(square.to(self.device).float() / 255 - mean) / std)
            found.append(self.model.visual_projection(seen.pooler_output).float().cpu())
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def load_clip(folder: Path | str, *, device: torch.device | str = "cpu") -> Scorer | ForeignClip:
    """A CLIP to measure with: an export of ours, or a folder as transformers writes it (`CLIPModel`).

    Raises:
        CheckpointError: When a file is missing or does not fit.
        EnvironmentRefused: When it is of transformers, which is not installed.
    """
    folder, device = Path(folder), torch.device(device)
    config = folder / "config.json"
    if not config.is_file() or read_json(config, refuse=CheckpointError).get("model_type") != "clip":
        return load_scorer(folder, device=device)
    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError as error:
        raise EnvironmentRefused(
            f"{folder}: is a CLIP of the transformers library, which is not installed: "
            "pip install 'tokscale[text-encoder]'"
        ) from error
    try:
        loader: Any = CLIPModel
        model, told = loader.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, local_files_only=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises whatever its parts do
        raise CheckpointError(f"{folder}: cannot be read as a CLIP ({error}); fetch all files of the model") from error
    if told["missing_keys"]:
        raise CheckpointError(
            f"{folder}: {len(told['missing_keys'])} weights are missing and would be random; fetch all files of it"
        )
    refuse_unread(model, folder, told["unexpected_keys"])
    described = folder / "preprocessor_config.json"
    values = read_json(described, refuse=CheckpointError) if described.is_file() else {}
    return ForeignClip(
        folder=folder,
        model=model.to(device).eval().requires_grad_(False),
        tokenizer=tokenizer,
        device=device,
        mean=tuple(values.get("image_mean", _MEAN)),
        std=tuple(values.get("image_std", _STD)),
    )
