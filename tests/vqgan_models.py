"""Small quantized autoencoders and images for their tests."""

import torch

from tokscale.base.batch import ImageBatch
from tokscale.base.config import decode
from tokscale.base.rng import generator, scope
from tokscale.tokenizers.vqgan.config import VQGANConfig
from tokscale.tokenizers.vqgan.model import VQGAN

CNN = {"kind": "cnn", "ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 8, "attn_resolutions": ()}
RESNET = {"kind": "resnet", "dim": 8, "layers": 2}
VIT = {"kind": "vit", "dim": 24, "depth": 1, "heads": 2, "patch_size": 4}
VQ = {"kind": "vq", "num_tokens": 16, "dim": 4}
RESIDUAL = {"kind": "residual", "num_tokens": 16, "dim": 4, "levels": 3}
TINY = {"kind": "vqgan", "image_size": 16, "network": RESNET, "quantizer": VQ}


def make(**options) -> VQGAN:
    with scope(0, "weights"):
        return VQGAN(decode(VQGANConfig, TINY | options))


def images(batch=4, channels=3, size=16) -> ImageBatch:
    pixels = torch.randint(0, 256, (batch, channels, 2, 2), generator=generator(0, "pictures"), dtype=torch.uint8)
    blocks = pixels.repeat_interleave(size // 2, dim=2).repeat_interleave(size // 2, dim=3)
    return ImageBatch(positions=torch.arange(batch), pixels=blocks)
