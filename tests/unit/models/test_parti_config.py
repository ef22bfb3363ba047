"""Parti's options: the original's names, sizes taken from tokenizers, and what does not go together."""

from types import SimpleNamespace

import pytest

from tokscale.base.config import decode, encode
from tokscale.base.errors import ConfigError
from tokscale.models.parti import PartiConfig, PartiSampling
from tokscale.nn.conditioning import CaptionConfig

IMAGE = SimpleNamespace(num_tokens=24, code_shape=(4, 6), image_size=32)
WORDS = SimpleNamespace(num_tokens=20)
SMALL = {"dim": 8, "depth": 1}


def test_sizes_come_from_the_tokenizers():
    config = PartiConfig(**SMALL).fitted(IMAGE, WORDS)
    assert config.sizes == (24, (4, 6)) and config.num_text_tokens is None
    assert config.fitted(IMAGE, None) == config
    assert PartiConfig(**SMALL, condition=CaptionConfig()).fitted(IMAGE, WORDS).num_text_tokens == 20


def test_a_size_that_contradicts_the_tokenizer_is_refused():
    with pytest.raises(ConfigError, match=r"model\.num_image_tokens: got 25, but the image tokenizer has 24"):
        PartiConfig(**SMALL, num_image_tokens=25).fitted(IMAGE, WORDS)
    with pytest.raises(ConfigError, match="rqtransformer"):
        PartiConfig(**SMALL).fitted(SimpleNamespace(num_tokens=24, code_shape=(4, 6, 2)), WORDS)
    with pytest.raises(ConfigError, match=r"model\.num_image_tokens"):
        _ = PartiConfig(**SMALL).sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_types": "conv_like"}, r"rel_pos_bias=true .* use model\.rel_pos_bias=false"),
        ({"rel_pos_bias": False, "rel_pos_index": "sequence"}, "does nothing"),
        ({"reversible": True}, r"reversible: .* use model\.reversible=false model\.remat=block"),
        ({"attn_types": []}, "empty list"),
        ({"kernel_size": 4}, "odd"),
        ({"attn_types": "sparse"}, r"attn_types"),
        ({"text_embed_dim": 4}, "unknown key"),
        ({"cond_drop_prob": 1.0}, "cond_drop_prob"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        decode(PartiConfig, SMALL | options, where="model")


def test_it_survives_plain_values():
    config = PartiConfig(**SMALL, rel_pos_bias=False, attn_types=("full", "conv_like")).fitted(IMAGE, WORDS)
    assert decode(PartiConfig, encode(config)) == config
    assert PartiSampling().cond_scale == 3.0 and PartiSampling().filter_thres == 0.9
