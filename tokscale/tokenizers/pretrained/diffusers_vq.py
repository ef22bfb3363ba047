"""`VQModel` of the diffusers library, such as aMUSEd's tokenizer. Needs the `diffusers` extra."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from einops import rearrange
from pydantic import PositiveInt

from tokscale.base.config import Config
from tokscale.base.errors import CheckpointError, ConfigError, EnvironmentRefused
from tokscale.base.files import read_json
from tokscale.base.shapes import Float, Int, Tensor
from tokscale.tokenizers.codec import ImageCodec
from tokscale.tokenizers.pretrained.checkpoint_files import read_tensors
from tokscale.tokenizers.quantize.base import nearest

_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


class DiffusersVQConfig(Config):
    """The library's own configuration, and how to use it."""

    kind: Literal["diffusers_vq"] = "diffusers_vq"
    image_size: PositiveInt = 256
    """Side of the square images in pixels."""
    input_range: Literal["-1_1", "0_1"] = "0_1"
    """Values of images that the network takes and gives; aMUSEd's are in [0, 1]."""
    model: dict[str, Any] = {}
    """Arguments of `diffusers.VQModel`. An import takes them from the model's `config.json`."""


class DiffusersVQ(ImageCodec):
    """Encoder and decoder of the library around our fp32 nearest-neighbour search."""

    config_class = DiffusersVQConfig
    version: ClassVar[str] = "diffusers-vq/1"

    def __init__(self, config: DiffusersVQConfig):
        super().__init__()
        self.config: DiffusersVQConfig = config
        self.model = _model_class()(**config.model)
        sizes = self.model.config
        reduction = 1 << (len(sizes.block_out_channels) - 1)
        if config.image_size % reduction:
            raise ConfigError(f"image_size: got {config.image_size}; this network needs a multiple of {reduction}")
        self.num_tokens = sizes.num_vq_embeddings
        self.image_size = config.image_size
        self.channels = sizes.in_channels
        self.code_shape = (config.image_size // reduction,) * 2

    def fingerprint_fields(self) -> dict[str, Any]:
        """See `ImageCodec.fingerprint_fields`."""
        names = ("act_fn", "norm_num_groups", "norm_type")  # what changes ids but no shape
        settings = {name: self.model.config[name] for name in names}
        return {"image_size": self.image_size, "input_range": self.config.input_range, **settings}

    def features(
        self, pixels: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim grid_h grid_w"]:
        """Features to be quantized, from images in [0, 1]."""
        pixels = 2 * pixels - 1 if self.config.input_range == "-1_1" else pixels
        return self.model.quant_conv(self.model.encoder(pixels))

    def quantize(self, features: Float[Tensor, "batch dim grid_h grid_w"]) -> Int[Tensor, "batch grid_h grid_w"]:
        """Ids of the nearest code vectors."""
        ids = nearest(rearrange(features, "b d h w -> (b h w) d"), self.model.quantize.embedding.weight)
        return rearrange(ids, "(b h w) -> b h w", h=features.shape[-2], w=features.shape[-1])

    def decode_to_unit_range(
        self, codes: Int[Tensor, "batch grid_h grid_w"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Images in [0, 1] of ids."""
        vectors = rearrange(self.model.quantize.embedding(codes), "b h w d -> b d h w")
        spatial = vectors if self.model.config.norm_type == "spatial" else None
        pixels = self.model.decoder(self.model.post_quant_conv(vectors), spatial)
        return (pixels + 1) / 2 if self.config.input_range == "-1_1" else pixels

    @classmethod
    def from_original(cls, config: DiffusersVQConfig, source: Path | str) -> Self:
        """The network in a folder that the library saved.

        Raises:
            CheckpointError: When the folder lacks its files, or they do not fit each other.
        """
        folder = Path(source)
        weights = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        if weights is None or not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder}: needs config.json and {_FILES[0]}, such as the vqvae folder of amused/amused-256"
            )
        sizes = {name: value for name, value in read_json(folder / "config.json").items() if not name.startswith("_")}
        config = config.model_copy(update={"model": sizes | config.model})
        tensors = {f"model.{name}": tensor for name, tensor in read_tensors(weights).items()}
        return cls.with_weights(config, tensors, weights)


def _model_class() -> Any:
    try:
        from diffusers.models.autoencoders.vq_model import VQModel  # here, since importing it takes seconds
    except ImportError as error:
        raise EnvironmentRefused(
            "an image tokenizer of kind 'diffusers_vq' needs the diffusers library: pip install 'tokscale[diffusers]'"
        ) from error
    return VQModel
