"""The discrete VAE of OpenAI's DALL-E, 32 x 32 codes of 8192 (Ramesh et al. 2021)."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, PositiveInt
from torch import nn

from tokscale.base.config import Config, LayerCount
from tokscale.base.errors import CheckpointError
from tokscale.base.shapes import Float, Int, Tensor
from tokscale.tokenizers.codec import ImageCodec
from tokscale.tokenizers.dvae.laplace import most_likely_pixels, squeeze
from tokscale.tokenizers.pretrained.checkpoint_files import read_tensors

_GROUPS = 4
_REDUCTION = 8
Maps = Float[Tensor, "batch _ _ _"]


class OpenAIDiscreteVAEConfig(Config):
    """Sizes of the published network."""

    kind: Literal["openai_dvae"] = "openai_dvae"
    image_size: Annotated[int, Field(gt=0, multiple_of=_REDUCTION)] = 256
    """Side of the square images in pixels."""
    num_tokens: PositiveInt = 8192
    """Entries of the codebook (`vocab_size`)."""
    hidden_dim: Annotated[int, Field(gt=0, multiple_of=4)] = 256
    """Channels of the first group (`n_hid`); each further group of the encoder doubles them."""
    codebook_dim: PositiveInt = 128
    """Channels of the decoder's input (`n_init`)."""
    blocks: LayerCount = 2
    """Residual blocks of a group (`n_blk_per_group`)."""


class OpenAIDiscreteVAE(ImageCodec):
    """Four groups of bottleneck blocks with pooling between them, and the mirror image for the decoder."""

    config_class = OpenAIDiscreteVAEConfig
    version: ClassVar[str] = "openai-dvae/1"

    def __init__(self, config: OpenAIDiscreteVAEConfig):
        super().__init__()
        self.config: OpenAIDiscreteVAEConfig = config
        self.num_tokens = config.num_tokens
        self.image_size = config.image_size
        self.channels = 3
        side = config.image_size // _REDUCTION
        self.code_shape = (side, side)
        widths = [config.hidden_dim << group for group in range(_GROUPS)]
        self.encoder = nn.Sequential(
            OrderedDict(
                input=nn.Conv2d(3, widths[0], 7, padding=3),
                **_groups([widths[0], *widths], config.blocks, kernels=(3, 3, 3, 1), resample=nn.MaxPool2d(2)),
            )
        )
        self.to_logits = nn.Conv2d(widths[-1], config.num_tokens, 1)
        self.codebook = nn.Embedding(config.num_tokens, config.codebook_dim)
        upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.decoder = nn.Sequential(
            OrderedDict(
                **_groups(
                    [config.codebook_dim, *reversed(widths)], config.blocks, kernels=(1, 3, 3, 3), resample=upsample
                ),
                relu=nn.ReLU(),
                output=nn.Conv2d(widths[0], 6, 1),
            )
        )

    def fingerprint_fields(self) -> dict[str, Any]:
        """See `ImageCodec.fingerprint_fields`."""
        return {"image_size": self.image_size}

    def features(self, pixels: Float[Tensor, "batch channels height width"]) -> Maps:
        """Activations before the codes' logits, from images in [0, 1]."""
        return F.relu(self.encoder(squeeze(pixels)))

    def quantize(self, features: Maps) -> Int[Tensor, "batch grid_h grid_w"]:
        """The most likely code of each place."""
        return self.to_logits(features).argmax(dim=1)

    def decode_to_unit_range(
        self, codes: Int[Tensor, "batch grid_h grid_w"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Images in [0, 1]: the mode of the decoder's logit-Laplace distribution."""
        out = self.decoder(rearrange(self.codebook(codes), "b h w d -> b d h w"))
        return most_likely_pixels(out[:, :3].float())

    @classmethod
    def from_original(cls, config: OpenAIDiscreteVAEConfig, source: Path | str) -> Self:
        """The network with the weights of OpenAI's two pickled modules, none of whose code runs.

        Raises:
            CheckpointError: When the folder lacks `encoder.pkl` or `decoder.pkl`, or they hold another network.
        """
        tensors: dict[str, Tensor] = {}
        for part in ("encoder", "decoder"):
            path = Path(source) / f"{part}.pkl"
            if not path.is_file():
                raise CheckpointError(
                    f"{path}: no such file; put encoder.pkl and decoder.pkl of OpenAI's DALL-E there "
                    f"(https://cdn.openai.com/dall-e/{part}.pkl)"
                )
            tensors |= {f"{part}.{name}": tensor for name, tensor in read_tensors(path).items()}
        return cls.with_weights(config, to_our_names(tensors), source)


def to_our_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the original's tensors; its first decoder convolution reads one-hot codes, which is our codebook."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".blocks.")
        rest = rest.removesuffix(".w") + ".weight" if rest.endswith(".w") else rest.removesuffix(".b") + ".bias"
        if rest.startswith("output.conv."):
            rest = rest.replace("output.conv.", "output." if part == "decoder" else "to_logits.")
        renamed[rest if rest.startswith("to_logits.") else f"{part}.{rest}"] = tensor
    if {"decoder.input.weight", "decoder.input.bias"} <= renamed.keys():
        weight, bias = renamed.pop("decoder.input.weight"), renamed.pop("decoder.input.bias")
        renamed["codebook.weight"] = rearrange(weight, "d n 1 1 -> n d") + bias
    return renamed


class Bottleneck(nn.Module):
    """Four convolutions at a quarter of the width, scaled down by the square of the network's depth, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, kernels: tuple[int, ...], depth: int):
        super().__init__()
        self.gain = 1 / depth**2
        self.id_path = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        widths = [inputs, *[outputs // 4] * 3, outputs]
        path: OrderedDict[str, nn.Module] = OrderedDict()
        for index, kernel in enumerate(kernels):
            path[f"relu_{index + 1}"] = nn.ReLU()
            path[f"conv_{index + 1}"] = nn.Conv2d(widths[index], widths[index + 1], kernel, padding=kernel // 2)
        self.res_path = nn.Sequential(path)

    def forward(self, x: Maps) -> Maps:
        """Add what the convolutions find."""
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.gain)


def _groups(widths: list[int], blocks: int, *, kernels: tuple[int, ...], resample: nn.Module) -> dict[str, nn.Module]:
    """Groups of blocks from each width to the next, with a change of resolution after all but the last."""
    groups: dict[str, nn.Module] = {}
    for group in range(_GROUPS):
        inputs, outputs = widths[group], widths[group + 1]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for block in range(blocks):
            layers[f"block_{block + 1}"] = Bottleneck(outputs if block else inputs, outputs, kernels, _GROUPS * blocks)
        if group < _GROUPS - 1:
            layers["resample"] = resample
        groups[f"group_{group + 1}"] = nn.Sequential(layers)
    return groups
