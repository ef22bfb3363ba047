"""Configuration of the trainable quantized autoencoders."""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from tokscale.base.config import MOST_LAYERS, Config, LayerCount
from tokscale.base.kinds import require_own
from tokscale.tokenizers.quantize.config import QuantizerConfig, VQConfig
from tokscale.tokenizers.vqgan.discriminator import AdversarialConfig
from tokscale.tokenizers.vqgan.perceptual import PerceptualConfig

Weight = Annotated[float, Field(ge=0)]


class AnyNetworkConfig(Config):
    """Base of the kinds of networks: what each says of itself."""

    any_size: ClassVar[bool]
    """Whether it reads images of other sides than it was made for, as convolutions do."""

    @property
    @abstractmethod
    def reduction(self) -> int:
        """Pixels per code along a side."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides ids beside its kind and its weights; enters the fingerprint."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a kind without one of its parts."""
        super().__pydantic_init_subclass__(**kwargs)
        require_own(cls, AnyNetworkConfig, ["any_size", "reduction", "identity"])


class CNNConfig(AnyNetworkConfig):
    """The convolutional network of taming-transformers; names are those of its configurations."""

    any_size = True
    kind: Literal["cnn"] = "cnn"
    ch: PositiveInt = 128
    """Channels at full resolution."""
    ch_mult: tuple[PositiveInt, ...] = (1, 1, 2, 2, 4)
    """Channels of each level as multiples of `ch`; each level but the first halves the resolution."""
    num_res_blocks: LayerCount = 2
    """Residual blocks of a level; the decoder has one more."""
    attn_resolutions: tuple[PositiveInt, ...] = (16,)
    """Feature sides at which each residual block is followed by attention."""
    z_channels: PositiveInt = 256
    """Width of the features beside the quantizer."""

    @property
    def reduction(self) -> int:
        """Pixels per code along a side."""
        return 1 << (len(self.ch_mult) - 1)

    def identity(self) -> dict[str, Any]:
        """Attention has no width of its own in the weights' names, but a place."""
        return {"attention": self.attn_resolutions}


class ResNetConfig(AnyNetworkConfig):
    """The network of muse-maskgit-pytorch's `VQGanVAE`: strided convolutions, leaky rectifiers, gated blocks."""

    any_size = True
    kind: Literal["resnet"] = "resnet"
    dim: PositiveInt = 64
    """Channels at full resolution."""
    layers: LayerCount = 4
    """Halvings of the resolution."""
    layer_mults: tuple[PositiveInt, ...] | None = None
    """Channels after each halving as multiples of `dim`; null doubles them at each. The original: (1, 2, 4, 8)."""
    num_resnet_blocks: Annotated[int, Field(ge=0, le=MOST_LAYERS)] = 1
    """Residual blocks at the lowest resolution: plain in the encoder, gated in the decoder."""
    groups: PositiveInt = 32
    """Groups of channels that are normalised together, or fewer where the width does not divide. The original: 16."""
    eps: float = Field(default=1e-6, gt=0)
    """Added to their variance. The original: 1e-5."""

    @model_validator(mode="after")
    def _a_multiple_for_each_layer(self) -> Self:
        if self.layer_mults is not None and len(self.layer_mults) != self.layers:
            raise ValueError(
                f"layer_mults has {len(self.layer_mults)} entries, layers={self.layers}; give one for each"
            )
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each resolution, the full one first."""
        mults = self.layer_mults or tuple(2 << layer for layer in range(self.layers))
        return (self.dim, *(self.dim * mult for mult in mults))

    @property
    def reduction(self) -> int:
        """Pixels per code along a side."""
        return 1 << self.layers

    @property
    def z_channels(self) -> int:
        """Width of the features beside the quantizer."""
        return self.widths[-1]

    def identity(self) -> dict[str, Any]:
        """How features are normalised, where it is not as ever."""
        normalization = (self.groups, self.eps)
        return {} if normalization == (32, 1e-6) else {"normalization": normalization}


class ViTConfig(AnyNetworkConfig):
    """The transformers of ViT-VQGAN (Yu et al. 2021, arXiv:2110.04627) and of parti-pytorch's `VitVQGanVAE`."""

    any_size = False
    kind: Literal["vit"] = "vit"
    patch_size: PositiveInt = 8
    """Side of the square of pixels that is one code."""
    dim: PositiveInt = 512
    """Width of the encoder. The paper: 512 (small), 768 (base), 1280 (large)."""
    depth: LayerCount = 8
    """Layers of the encoder. The paper: 8, 12, 32."""
    heads: PositiveInt = 8
    """Attention heads of the encoder. The paper: 8, 12, 16."""
    ff_mult: float = Field(default=4, gt=0)
    """Width of the feed-forwards as a multiple of the width."""
    decoder_dim: PositiveInt | None = None
    """Width of the decoder; null for the encoder's. Parti's is finer than its encoder."""
    decoder_depth: LayerCount | None = None
    """Layers of the decoder; null for the encoder's."""
    decoder_heads: PositiveInt | None = None
    """Attention heads of the decoder; null for the encoder's."""

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        for name, dim, heads in (("", self.dim, self.heads), ("decoder_", *self.decoder[::2])):
            if dim % heads:
                raise ValueError(f"{name}dim={dim} does not divide into {name}heads={heads}")
        return self

    @property
    def decoder(self) -> tuple[int, int, int]:
        """Width, layers and heads of the decoder."""
        return self.decoder_dim or self.dim, self.decoder_depth or self.depth, self.decoder_heads or self.heads

    @property
    def reduction(self) -> int:
        """Pixels per code along a side."""
        return self.patch_size

    @property
    def z_channels(self) -> int:
        """Width of the features beside the quantizer."""
        return self.dim

    def identity(self) -> dict[str, Any]:
        """How the width divides into heads."""
        return {"heads": self.heads}


NetworkConfig = Annotated[CNNConfig | ResNetConfig | ViTConfig, Field(discriminator="kind")]


class VQGANConfig(Config):
    """A quantized autoencoder: the network, the quantizer, and the losses that train them."""

    kind: Literal["vqgan"] = "vqgan"
    image_size: PositiveInt = 256
    """Side of the square images in pixels; a multiple of the network's reduction."""
    channels: Literal[1, 3, 4] = 3
    """1 for grey, 3 for colour, 4 with transparency."""
    network: NetworkConfig = CNNConfig()
    """Encoder and decoder."""
    pixel_range: Literal["signed", "unit"] = "signed"
    """Of what the network reads and gives: [-1, 1], or [0, 1] as muse-maskgit-pytorch has it."""
    quantizer: QuantizerConfig = VQConfig()
    """What turns features into codes."""
    l1_weight: Weight = 1.0
    """Of the mean absolute difference to the image, in [-1, 1]."""
    l2_weight: Weight = 0.0
    """Of the mean squared difference (the originals' `l2_recon_loss`)."""
    logit_laplace_weight: Weight = 0.0
    """Of the logit-Laplace likelihood (ViT-VQGAN); the decoder then gives a scale beside each value."""
    perceptual: PerceptualConfig | None = None
    """The perceptual loss; null for none. Its weights are read for training alone."""
    adversarial: AdversarialConfig | None = None
    """The discriminator; null to train without."""
    freeze_encoder: bool = False
    """Train the decoder alone: encoder and codebook stay what `init_from` gave, and so do all ids."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_size % self.network.reduction:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of the network's reduction, {self.network.reduction}, "
                "so the grid would not be whole; change one of them"
            )
        if not self.l1_weight + self.l2_weight + self.logit_laplace_weight:
            raise ValueError("l1_weight, l2_weight and logit_laplace_weight are all 0; nothing would ask for the image")
        return self

    @property
    def num_tokens(self) -> int:
        """Codes of one place and level."""
        return self.quantizer.num_tokens

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Grid of codes, with the levels of a cascade last."""
        side = self.image_size // self.network.reduction
        levels = self.quantizer.code_levels
        return (side, side) if levels is None else (side, side, levels)

    def fingerprint_fields(self) -> dict[str, Any]:
        """What decides ids beside the weights (which carry every width and depth)."""
        return {
            "image_size": self.image_size,
            "channels": self.channels,
            "network": self.network.kind,
            "quantizer": self.quantizer.kind,
            "code_shape": self.code_shape,
            **self.network.identity(),
            **self.quantizer.identity(),
            **({} if self.pixel_range == "signed" else {"pixel_range": self.pixel_range}),
        }
