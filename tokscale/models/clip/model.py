"""CLIP: captions and images in one space, pairs near, all others far (Radford et al. 2021, arXiv:2103.00020)."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tokscale.base.batch import ImageBatch, LossOutput
from tokscale.base.errors import DataError
from tokscale.base.protocols import Collectives, current
from tokscale.base.shapes import Bool, Float, Int, Tensor, UInt8
from tokscale.models.clip.config import CLIPConfig
from tokscale.models.common import evaluating
from tokscale.models.model import ScoringModel
from tokscale.nn.layout import TokenLayout
from tokscale.nn.stack import Stack


class CLIP(ScoringModel):
    """Captions and images to unit vectors, whose scaled product says how well they fit.

    Args:
        config: Options; sizes must be known, see `CLIPConfig.fitted`.

    Raises:
        ConfigError: When a size is not known.
    """

    config_class = CLIPConfig

    def __init__(self, config: CLIPConfig):
        super().__init__()
        words, side = config.sizes
        self.config = config
        self.text_emb = nn.Embedding(words, config.dim_text)
        self.text_pos_emb = nn.Embedding(config.text_seq_len, config.dim_text)
        self.text_transformer = Stack(config.text_stack, TokenLayout(config.text_seq_len), causal=False)
        self.to_text_latent = nn.Linear(config.dim_text, config.dim_latent, bias=False)
        self.to_visual_embedding = nn.Linear(config.channels * config.visual_patch_size**2, config.dim_image)
        self.visual_pos_emb = nn.Embedding(side**2, config.dim_image)
        self.visual_transformer = Stack(config.visual_stack, TokenLayout(0, side, side), causal=False)
        self.to_visual_latent = nn.Linear(config.dim_image, config.dim_latent, bias=False)
        self.logit_scale = LogitScale(config.temperature_init, config.temperature_max)

    def encode_text(
        self, text: Int[Tensor, "batch text"], text_mask: Bool[Tensor, "batch text"] | None = None
    ) -> Float[Tensor, "batch latent"]:
        """Unit vectors of captions; padding counts as text when no mask is given, as in the original.

        A caption without a real token has the zero vector.
        """
        x = self.text_emb(text) + self.text_pos_emb(torch.arange(text.shape[1], device=text.device))
        x = self.text_transformer(x, key_mask=text_mask)
        return F.normalize(self.to_text_latent(_masked_mean(x, text_mask)), dim=-1)

    def encode_image(self, pixels: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch latent"]:
        """Unit vectors of images.

        Raises:
            DataError: When the images have another size or number of channels than the model's.
        """
        size = self.config.visual_image_size
        if tuple(pixels.shape[1:]) != (self.config.channels, size, size):
            raise DataError(
                f"images of shape {tuple(pixels.shape[1:])} for a CLIP of {self.config.channels} channels and "
                f"{size} pixels; resize them"
            )
        patch = self.config.visual_patch_size
        patches = rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
        x = self.to_visual_embedding(patches.to(self.visual_pos_emb.weight.dtype) / 255)
        x = x + self.visual_pos_emb(torch.arange(x.shape[1], device=x.device))
        return F.normalize(self.to_visual_latent(self.visual_transformer(x).mean(dim=1)), dim=-1)

    def forward(self, batch: ImageBatch) -> LossOutput:
        """Cross-entropy of finding each caption's image and each image's caption among those of all ranks.

        Raises:
            DataError: When the batch has no captions.
        """
        if batch.text is None:
            raise DataError("CLIP trains on images with captions, but the batch has no caption ids")
        text = self.encode_text(batch.text, batch.text_mask)
        image = self.encode_image(batch.pixels)
        ranks = current(Collectives)
        labels = ranks.rank_offset(len(text)) + torch.arange(len(text), device=text.device)
        scale = self.logit_scale()
        to_image = scale * (text @ ranks.gather_batch(image).t()).float()
        to_text = scale * (image @ ranks.gather_batch(text).t()).float()
        parts = {"text_to_image": F.cross_entropy(to_image, labels), "image_to_text": F.cross_entropy(to_text, labels)}
        found = (to_image.argmax(-1) == labels).float().mean()
        return LossOutput(
            total=(parts["text_to_image"] + parts["image_to_text"]) / 2,
            parts=parts,
            weights={"text_to_image": 0.5, "image_to_text": 0.5},
            metrics={"retrieval_accuracy": found, "logit_scale": scale.detach()},
        )

    def score(
        self,
        text: Int[Tensor, "batch text"],
        text_mask: Bool[Tensor, "batch text"] | None,
        pixels: UInt8[Tensor, "batch channels height width"],
    ) -> Float[Tensor, " batch"]:
        """How well each image fits its own caption: cosine times the learned scale."""
        with evaluating(self):
            cosine = (self.encode_text(text, text_mask) * self.encode_image(pixels)).sum(-1)
            return self.logit_scale() * cosine.float()

    def train_flops(self) -> float:
        """Floating-point operations of one pair's forward and backward pass."""
        patches = self.visual_pos_emb.num_embeddings
        embed = 2 * patches * self.to_visual_embedding.in_features * self.config.dim_image
        latents = 2 * (self.config.dim_text + self.config.dim_image) * self.config.dim_latent
        return 3 * (embed + latents + self.text_transformer.forward_flops() + self.visual_transformer.forward_flops())


class LogitScale(nn.Module):
    """A learned factor on similarities, kept as its logarithm."""

    def __init__(self, start: float, most: float | None):
        super().__init__()
        # One element, not none: DeepSpeed cannot broadcast a parameter without an axis.
        self.temperature = nn.Parameter(torch.full((1,), float(start)))
        self.most = most

    def forward(self) -> Float[Tensor, ""]:
        """The factor, in single precision."""
        value = rearrange(self.temperature.float(), "1 -> ")
        return (value if self.most is None else _AtMost.apply(value, self.most)).exp()  # type: ignore[union-attr]


class _AtMost(torch.autograd.Function):
    """`min(x, most)`; beyond `most` it still passes gradients that lead back, so that nothing stays stuck there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.most = most
        return x.clamp(max=most)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,), (grad,) = ctx.saved_tensors, grads
        return torch.where((x <= ctx.most) | (grad > 0), grad, 0), None


def _masked_mean(
    x: Float[Tensor, "batch seq dim"], mask: Bool[Tensor, "batch seq"] | None
) -> Float[Tensor, "batch dim"]:
    if mask is None:
        return x.mean(dim=1)
    # A row that is all padding has no mean; zero is a value that training survives.
    total = x.masked_fill(~rearrange(mask, "b n -> b n 1"), 0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)
