from pathlib import Path

import pytest
import torch
import yaml

from tokscale.base.config import decode
from tokscale.tokenizers.image import ImageTokenizerConfig, codec_class

FOLDER = Path(__file__).parents[3] / "configs/tokenizer"
SHAPES = {
    "amused": None,  # its network comes with the weights
    "cosmos_di16": None,  # its programs come as files
    "dvae_dalle_paper": (32, 32),
    "dvae_emoji": (12, 12),
    "dvae_emoji_small": (8, 8),
    "dvae_shapes": (8, 8),
    "kakao_rqvae": (8, 8, 4),
    "llamagen_vq16": (16, 16),
    "llamagen_vq8": (32, 32),
    "openai_dvae": (32, 32),
    "rqvae_imagenet": (8, 8, 4),
    "rqvae_shapes": (4, 4, 4),
    "rqvae_shapes_8x8x2": (8, 8, 2),
    "taming_f16_1024": (16, 16),
    "taming_f16_16384": (16, 16),
    "taming_gumbel_f8": (32, 32),
    "vitvqgan_base": (32, 32),
    "vitvqgan_parti": (32, 32),
    "vitvqgan_shapes": (8, 8),
    "vqgan_emoji": (8, 8),
    "vqgan_f16_16384": (16, 16),
    "vqgan_llamagen": (16, 16),
    "vqgan_maskgit": (16, 16),
    "vqgan_muse": (16, 16),
    "vqgan_muse_pytorch": (16, 16),
    "vqgan_shapes": (8, 8),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shipped_configurations_build_the_published_grids(name):
    config = decode(ImageTokenizerConfig, yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))
    if SHAPES[name] is not None:
        with torch.device("meta"):
            codec = codec_class(config)(config)
        assert codec.code_shape == SHAPES[name]
        side = config.image_size // codec.code_shape[0]
        with torch.no_grad():
            features = codec.features(torch.empty(1, 3, 2 * side, 2 * side, device="meta"))
        assert features.shape[-2:] == (2, 2)


def test_every_image_tokenizer_that_is_shipped_is_checked():
    kinds = {path.stem: yaml.safe_load(path.read_text())["kind"] for path in FOLDER.glob("*.yaml")}
    assert {name for name, kind in kinds.items() if kind != "bpe"} == set(SHAPES)
