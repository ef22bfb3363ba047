"""From a configuration to its encoder and decoder."""

from dataclasses import dataclass
from typing import Protocol, assert_never

from torch import nn

from tokscale.base.shapes import Float, Tensor
from tokscale.tokenizers.pretrained import cnn
from tokscale.tokenizers.vqgan import resnet, vit
from tokscale.tokenizers.vqgan.config import CNNConfig, ResNetConfig, ViTConfig, VQGANConfig

Maps = Float[Tensor, "batch _ _ _"]


class PixelDecoder(Protocol):
    """A decoder whose last layer is linear in its weight, which the adaptive weight of the GAN relies on."""

    conv_out: nn.Conv2d | nn.ConvTranspose2d

    def hidden(self, z: Maps) -> Maps:
        """Everything but the last layer."""
        ...


@dataclass(frozen=True)
class Network:
    """Both halves, and the width of the features beside the quantizer on each side."""

    encoder: nn.Module
    decoder: nn.Module
    features: int
    restored: int


def build_network(config: VQGANConfig) -> Network:
    """The network of a configuration."""
    network, grid = config.network, config.code_shape[0]
    inputs, outputs = config.channels, config.channels * (2 if config.logit_laplace_weight else 1)
    match network:
        case CNNConfig():
            size = config.image_size
            options = {
                "ch": network.ch,
                "ch_mult": network.ch_mult,
                "blocks": network.num_res_blocks,
                "attn_levels": [i for i in range(len(network.ch_mult)) if size >> i in network.attn_resolutions],
                "z_channels": network.z_channels,
            }
            encoder, decoder = cnn.CNNEncoder(**options, inputs=inputs), cnn.CNNDecoder(**options, outputs=outputs)
            return Network(encoder, decoder, network.z_channels, network.z_channels)
        case ResNetConfig():
            encoder, decoder = resnet.ResNetEncoder(network, inputs), resnet.ResNetDecoder(network, outputs)
            return Network(encoder, decoder, network.z_channels, network.z_channels)
        case ViTConfig():
            encoder, decoder = vit.ViTEncoder(network, inputs, grid), vit.ViTDecoder(network, outputs, grid)
            return Network(encoder, decoder, network.z_channels, network.decoder[0])
        case _:
            assert_never(network)
