"""VQGAN of taming-transformers and its relatives: one network, four quantizers, three layouts of published weights."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, assert_never

from pydantic import PositiveInt, model_validator
from torch import nn

from tokscale.base.config import Config, LayerCount
from tokscale.base.errors import CheckpointError
from tokscale.base.kinds import for_each
from tokscale.base.shapes import Float, Int, Tensor
from tokscale.tokenizers.codec import ImageCodec
from tokscale.tokenizers.pretrained.checkpoint_files import read_tensors
from tokscale.tokenizers.pretrained.cnn import CNNDecoder, CNNEncoder
from tokscale.tokenizers.pretrained.quantizers import GumbelQuantizer, NearestQuantizer, Quantizer, ResidualQuantizer

PublishedQuantizer = Literal["nearest", "cosine", "gumbel", "residual"]
HAS_LEVELS = for_each(PublishedQuantizer, {"nearest": False, "cosine": False, "gumbel": False, "residual": True})
"""Whether a place has several codes, one a level."""


class TamingConfig(Config):
    """Sizes of a published checkpoint; names are those of its own configuration where it has one."""

    kind: Literal["taming"] = "taming"
    image_size: PositiveInt = 256
    """Side of the square images to encode; need not be the training size."""
    resolution: PositiveInt = 256
    """Side of the images the weights were trained on: with `attn_resolutions` it says which levels have attention."""
    quantizer: PublishedQuantizer = "nearest"
    """`nearest` for taming f16, `gumbel` for taming f8, `cosine` for LlamaGen, `residual` for kakaobrain's RQ-VAE."""
    num_tokens: PositiveInt = 16384
    """Entries of the codebook (`n_embed`)."""
    embed_dim: PositiveInt = 256
    """Width of a codebook entry."""
    z_channels: PositiveInt = 256
    """Width of the features beside the quantizer."""
    ch: PositiveInt = 128
    """Channels at full resolution; a multiple of 32."""
    ch_mult: tuple[PositiveInt, ...] = (1, 1, 2, 2, 4)
    """Channels of each level as multiples of `ch`; each level but the first halves the resolution."""
    num_res_blocks: LayerCount = 2
    """Residual blocks of a level."""
    attn_resolutions: tuple[PositiveInt, ...] = (16,)
    """Feature sides at which each residual block is followed by attention."""
    levels: PositiveInt = 1
    """Depth of the residual quantizer; 1 for the others."""
    shared_codebook: bool = True
    """One codebook for all levels of the residual quantizer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_size % self.reduction or self.resolution % self.reduction:
            raise ValueError(
                f"image_size={self.image_size} and resolution={self.resolution} must be multiples of {self.reduction}, "
                f"the reduction of {len(self.ch_mult)} levels"
            )
        if self.ch % 32:
            raise ValueError(f"ch={self.ch} must be a multiple of 32, the groups of the normalization")
        if self.levels > 1 and not HAS_LEVELS[self.quantizer]:
            raise ValueError(f"levels={self.levels} needs quantizer=residual, not {self.quantizer}")
        return self

    @property
    def reduction(self) -> int:
        """Pixels per code along a side."""
        return 1 << (len(self.ch_mult) - 1)

    @property
    def attn_levels(self) -> tuple[int, ...]:
        """Indices of the levels with attention."""
        return tuple(i for i in range(len(self.ch_mult)) if self.resolution >> i in self.attn_resolutions)


class TamingVQGAN(ImageCodec):
    """Encoder and decoder of `cnn.py` around a quantizer."""

    config_class = TamingConfig
    version: ClassVar[str] = "taming/1"

    def __init__(self, config: TamingConfig):
        super().__init__()
        self.config: TamingConfig = config
        self.num_tokens = config.num_tokens
        self.image_size = config.image_size
        self.channels = 3
        side = config.image_size // config.reduction
        self.code_shape = (side, side, config.levels) if HAS_LEVELS[config.quantizer] else (side, side)
        sizes: dict[str, Any] = {
            "ch": config.ch,
            "ch_mult": config.ch_mult,
            "blocks": config.num_res_blocks,
            "attn_levels": config.attn_levels,
            "z_channels": config.z_channels,
        }
        self.encoder = CNNEncoder(**sizes)
        self.decoder = CNNDecoder(**sizes)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.quantizer = _quantizer(config)

    def fingerprint_fields(self) -> dict[str, Any]:
        """See `ImageCodec.fingerprint_fields`."""
        return {"image_size": self.image_size, "quantizer": self.config.quantizer, "levels": self.config.levels}

    def features(
        self, pixels: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim grid_h grid_w"]:
        """Features to be quantized, from images in [0, 1]."""
        return self.quant_conv(self.encoder(2 * pixels - 1))

    def quantize(self, features: Float[Tensor, "batch dim grid_h grid_w"]) -> Int[Tensor, "batch *code_shape"]:
        """Ids of features."""
        return self.quantizer(features)

    def decode_to_unit_range(
        self, codes: Int[Tensor, "batch *code_shape"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Images in [0, 1] of ids."""
        return (self.decoder(self.post_quant_conv(self.quantizer.lookup(codes))) + 1) / 2

    @classmethod
    def from_original(cls, config: TamingConfig, source: Path | str) -> Self:
        """The network with the weights of a published checkpoint file, whichever of the three layouts it has.

        Raises:
            CheckpointError: When the file is missing, or holds a network that `config` does not describe.
        """
        return cls.with_weights(config, to_our_names(read_tensors(source), config), source)


def to_our_names(tensors: Mapping[str, Tensor], config: TamingConfig) -> dict[str, Tensor]:
    """Rename the tensors of taming-transformers, LlamaGen or kakaobrain's rq-vae-transformer; drop training's own.

    Raises:
        CheckpointError: When a shared codebook is asked for and the levels differ.
    """
    last = len(config.ch_mult) - 1
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _TRAINING_ONLY.match(name):
            continue
        for pattern, replacement in _LLAMAGEN:
            name = pattern.sub(replacement, name)
        # LlamaGen numbers the decoder's levels in order of use, taming by resolution.
        name = re.sub(r"^decoder\.conv_blocks\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}.", name)
        name = re.sub(r"^quantize\.(embedding|embed)\.", "quantizer.codebook.", name)
        name = re.sub(r"^quantize\.proj\.", "quantizer.proj.", name)
        if name.startswith("quantizer.codebooks.") and len(tensor) == config.num_tokens + 1:
            tensor = tensor[:-1]  # kakaobrain's last row is padding, not a code
        renamed[name] = tensor
    return _share_codebooks(renamed) if HAS_LEVELS[config.quantizer] and config.shared_codebook else renamed


_TRAINING_ONLY = re.compile(
    r"loss\.|discriminator\.|quantize\.codebook_used$|quantizer\.codebooks\.\d+\.(cluster_size_ema|embed_ema)$"
)
_LLAMAGEN = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^encoder\.conv_blocks\.", "encoder.down."),
        (r"^((?:encoder\.down|decoder\.conv_blocks)\.\d+)\.res\.", r"\1.block."),
        (r"^(encoder|decoder)\.mid\.0\.", r"\1.mid.block_1."),
        (r"^(encoder|decoder)\.mid\.1\.", r"\1.mid.attn_1."),
        (r"^(encoder|decoder)\.mid\.2\.", r"\1.mid.block_2."),
    )
)


def _share_codebooks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    first, *others = (name for name in sorted(tensors) if name.startswith("quantizer.codebooks."))
    for name in others:
        if not tensors.pop(name).equal(tensors[first]):
            raise CheckpointError(f"{name} differs from {first}; set tokenizer.shared_codebook=false for these weights")
    return tensors


def _quantizer(config: TamingConfig) -> Quantizer:
    match config.quantizer:
        case "nearest" | "cosine" as name:
            return NearestQuantizer(config.num_tokens, config.embed_dim, cosine=name == "cosine")
        case "gumbel":
            return GumbelQuantizer(config.num_tokens, config.embed_dim, features=config.embed_dim)
        case "residual":
            return ResidualQuantizer(
                config.num_tokens, config.embed_dim, config.levels, shared_codebook=config.shared_codebook
            )
        case _:
            assert_never(config.quantizer)
