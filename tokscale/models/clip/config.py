"""Options of CLIP, under the names of the original (dalle-pytorch 1.6.6)."""

import math
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from tokscale.base.config import LayerCount
from tokscale.base.errors import ConfigError
from tokscale.base.protocols import ImageTokenizer, TextTokenizer
from tokscale.models.common import fit_sizes
from tokscale.models.model import AnyModelConfig
from tokscale.nn.config import StackConfig


class CLIPConfig(AnyModelConfig):
    """A caption encoder and an image encoder that meet in one latent space (Radford et al. 2021, arXiv:2103.00020)."""

    kind: Literal["clip"] = "clip"
    dim_text: PositiveInt = 512
    """Width of the caption encoder."""
    dim_image: PositiveInt = 512
    """Width of the image encoder."""
    dim_latent: PositiveInt = 512
    """Width of the shared space."""
    num_text_tokens: int | None = Field(default=None, ge=2)
    """Entries of the text tokenizer, id 0 being padding. Taken from the tokenizer when left out."""
    text_enc_depth: LayerCount = 6
    """Layers of the caption encoder."""
    text_seq_len: PositiveInt = 256
    """Caption tokens."""
    text_heads: PositiveInt = 8
    """Attention heads of the caption encoder."""
    visual_enc_depth: LayerCount = 6
    """Layers of the image encoder."""
    visual_heads: PositiveInt = 8
    """Attention heads of the image encoder."""
    visual_image_size: PositiveInt | None = None
    """Side of the images, in pixels. Taken from the image tokenizer when left out."""
    visual_patch_size: PositiveInt = 32
    """Side of the patches that become tokens, in pixels."""
    channels: PositiveInt = 3
    """Colour channels."""
    dim_head: PositiveInt = 64
    """Width of one attention head (fixed in the original)."""
    temperature_init: float = math.log(1 / 0.07)
    """Initial logarithm of the factor on similarities: the paper's; the original starts at 1."""
    temperature_max: float | None = math.log(100)
    """Largest logarithm of that factor: the paper's; `null` for none, as in the original."""

    @model_validator(mode="after")
    def _whole_patches(self) -> Self:
        if self.visual_image_size is not None and self.visual_image_size % self.visual_patch_size:
            raise ValueError(
                f"visual_image_size={self.visual_image_size} is not a multiple of "
                f"visual_patch_size={self.visual_patch_size}"
            )
        return self

    def fitted(self, image: ImageTokenizer | None, text: TextTokenizer | None) -> Self:
        """This configuration with its sizes taken from the tokenizers.

        Raises:
            ConfigError: When a size was given and is another, or patches do not tile the images.
        """
        side = None if image is None else image.image_size
        if side is not None and side % self.visual_patch_size:
            raise ConfigError(
                f"model.visual_patch_size: {self.visual_patch_size} does not divide images of {side} pixels"
            )
        return fit_sizes(
            self,
            visual_image_size=(side, "image tokenizer"),
            num_text_tokens=(None if text is None else text.num_tokens, "text tokenizer"),
        )

    @property
    def sizes(self) -> tuple[int, int]:
        """Text entries, and patches along an image's side.

        Raises:
            ConfigError: When they are neither given nor fitted.
        """
        if self.num_text_tokens is None or self.visual_image_size is None:
            raise ConfigError(
                "model.num_text_tokens and model.visual_image_size are not known yet; give them, or call "
                "`config.fitted(image_tokenizer, text_tokenizer)`"
            )
        return self.num_text_tokens, self.visual_image_size // self.visual_patch_size

    @property
    def text_stack(self) -> StackConfig:
        """The caption encoder's stack."""
        return StackConfig(
            dim=self.dim_text,
            depth=self.text_enc_depth,
            heads=self.text_heads,
            dim_head=self.dim_head,
            rotary_emb=False,
        )

    @property
    def visual_stack(self) -> StackConfig:
        """The image encoder's stack."""
        return StackConfig(
            dim=self.dim_image,
            depth=self.visual_enc_depth,
            heads=self.visual_heads,
            dim_head=self.dim_head,
            rotary_emb=False,
        )
