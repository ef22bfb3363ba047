"""Weights of muse-maskgit-pytorch's `VQGanVAE` (0.3.5), alone or inside of a `MaskGit`."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from pydantic import PositiveInt

from tokscale.base.config import Config, decode
from tokscale.base.errors import ConfigError
from tokscale.base.shapes import Shaped, Tensor
from tokscale.tokenizers.vqgan.config import ResNetConfig, VQGANConfig

State = Mapping[str, Shaped[Tensor, "..."]]
MARK = "enc_dec.encoders.0.weight"
"""An entry by which the state dict of a `VQGanVAE` is known."""
_ENTRY = re.compile(r"enc_dec\.(encoders|decoders)\.(\d+)\.(?:(net)\.)?(?:(\d+)\.)?(weight|bias)")
_PLAIN = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2", "6": "conv3"}
_GATED = {"0": "conv1", "2": "norm1", "3": "conv2", "5": "norm2", "6": "conv3"}
_PROJECTIONS = {"quantizer.project_in.": "quant_conv.", "quantizer.project_out.": "post_quant_conv."}
_KERNEL = 5


class _Options(Config):
    """Arguments of the original's constructor that no shape tells."""

    image_size: PositiveInt = 256
    resnet_groups: PositiveInt = 16
    l2_recon_loss: bool = False


def config_from_original(state: State, options: Mapping[str, Any]) -> VQGANConfig:
    """Options read off the weights.

    Args:
        state: Of a `VQGanVAE`.
        options: What they do not tell: `image_size`, `resnet_groups`, `l2_recon_loss`.

    Raises:
        ConfigError: When an option has no counterpart here, or the quantizer is another than the original can build.
    """
    given = decode(_Options, dict(options), where="hparams")
    first = state[MARK]
    if first.shape[-1] != _KERNEL:
        raise ConfigError(f"first_conv_kernel_size={first.shape[-1]}: the network here has {_KERNEL}")
    if "quantizer.mask" not in state:
        raise ConfigError("no LFQ quantizer: version 0.3.5 builds no other (its VectorQuantize ends in a TypeError)")
    widths = [len(weight) for _, weight in _layers(state, "encoders", "0.weight")]
    blocks = len(_layers(state, "encoders", "net.0.weight"))
    return decode(
        VQGANConfig,
        {
            "image_size": given.image_size,
            "channels": first.shape[1],
            "pixel_range": "unit",
            "network": {
                "kind": "resnet",
                "dim": len(first),
                "layers": len(widths),
                "layer_mults": [width // len(first) for width in widths],
                "num_resnet_blocks": blocks,
                "groups": given.resnet_groups,
                "eps": 1e-5,
            },
            "quantizer": {"kind": "lfq", "num_tokens": 1 << len(state["quantizer.mask"])},
            "l1_weight": float(not given.l2_recon_loss),
            "l2_weight": float(given.l2_recon_loss),
        },
        where="hparams",
    )


def state_dict_from_original(state: State, config: VQGANConfig) -> dict[str, Tensor]:
    """Our names for the original's tensors. Its discriminator is left out: ours is another.

    Raises:
        ConfigError: For an entry that has no place here, or a stored buffer that is not what is computed here.
    """
    network, dim = config.network, config.quantizer.dim
    assert type(network) is ResNetConfig
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        projection = next((ours for theirs, ours in _PROJECTIONS.items() if name.startswith(theirs)), None)
        if name.startswith("discr."):
            continue
        if name == "quantizer.mask":
            if not tensor.equal(2 ** torch.arange(dim - 1, -1, -1)):
                raise ConfigError(f"{name}: the values of the signs are others than here")
        elif projection is not None:
            part = name.rpartition(".")[2]
            found[projection + part] = rearrange(tensor, "o i -> o i 1 1") if part == "weight" else tensor
        elif (renamed := _renamed(name, network.layers, network.num_resnet_blocks)) is not None:
            found[renamed] = tensor
        else:
            raise ConfigError(f"{name}: nothing here takes this entry; it is not of a VQGanVAE with {config!r}")
    if "quant_conv.weight" not in found:  # features of as many channels as there are signs
        for conv in _PROJECTIONS.values():
            found |= {f"{conv}weight": torch.eye(dim)[:, :, None, None], f"{conv}bias": torch.zeros(dim)}
    if len(found["quant_conv.weight"]) != dim:
        raise ConfigError(f"num_codebooks={len(found['quant_conv.weight']) // dim}: one code for a place is read here")
    return found


def _layers(state: State, side: str, ending: str) -> list[tuple[int, Tensor]]:
    found = re.compile(rf"enc_dec\.{side}\.(\d+)\.{re.escape(ending)}")
    return sorted((int(match[1]), state[name]) for name in state if (match := found.fullmatch(name)))


def _renamed(name: str, layers: int, blocks: int) -> str | None:
    match = _ENTRY.fullmatch(name)
    if match is None:
        return None
    at, inside, part = int(match[2]), match[4], match[5]
    decoding = match[1] == "decoders"
    owner, ends = ("decoder", layers + blocks) if decoding else ("encoder", 0)
    if at == ends:
        return f"{owner}.{'conv_out' if decoding else 'conv_in'}.{part}" if inside is None else None
    sampled, block = (at - blocks, at) if decoding else (at - 1, at - 1 - layers)
    if match[3]:
        layer = (_GATED if decoding else _PLAIN).get(inside)
        return f"{owner}.blocks.{block}.{layer}.{part}" if layer and 0 <= block < blocks else None
    return f"{owner}.{'up' if decoding else 'down'}.{sampled}.{part}" if 0 <= sampled < layers else None
