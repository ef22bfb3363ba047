"""DALL-E's options: the original's names, and sizes taken from tokenizers."""

from types import SimpleNamespace

import pytest

from tokscale.base.config import decode, encode
from tokscale.base.errors import ConfigError
from tokscale.models.dalle import DALLEConfig, DALLESampling

IMAGE = SimpleNamespace(num_tokens=24, code_shape=(4, 6), image_size=32)
WORDS = SimpleNamespace(num_tokens=20)


def test_sizes_come_from_the_tokenizers():
    config = DALLEConfig(dim=8, depth=1).fitted(IMAGE, WORDS)
    assert config.sizes == (20, 24, (4, 6))
    assert config.fitted(IMAGE, None) == config


def test_a_size_that_contradicts_the_tokenizer_is_refused():
    with pytest.raises(ConfigError, match=r"model\.num_image_tokens: got 25, but the image tokenizer has 24"):
        DALLEConfig(dim=8, depth=1, num_image_tokens=25).fitted(IMAGE, WORDS)


def test_unknown_sizes_are_named():
    with pytest.raises(ConfigError, match=r"model\.num_text_tokens"):
        _ = DALLEConfig(dim=8, depth=1, num_image_tokens=24, image_grid=(4, 6)).sizes


def test_codes_with_levels_are_refused():
    with pytest.raises(ConfigError, match="rqtransformer"):
        DALLEConfig(dim=8, depth=1).fitted(SimpleNamespace(num_tokens=24, code_shape=(4, 6, 2)), WORDS)


def test_sparse_attn_puts_sparse_into_the_attention_kinds():
    everywhere = decode(DALLEConfig, {"dim": 8, "depth": 3, "sparse_attn": True})
    assert everywhere.layer_types() == ("sparse",) * 3
    some = decode(DALLEConfig, {"dim": 8, "depth": 5, "attn_types": ["full", "axial_row"], "sparse_attn": [0, 1]})
    assert some.layer_types() == ("full", "sparse", "full", "sparse", "full")
    assert decode(DALLEConfig, encode(some)) == some


def test_one_attention_kind_may_be_given_as_a_string():
    assert DALLEConfig(dim=8, depth=2, attn_types="axial_row").layer_types() == ("axial_row",) * 2  # type: ignore[arg-type]


def test_misspelt_options_are_answered_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'loss_img_weight'"):
        decode(DALLEConfig, {"dim": 8, "depth": 1, "loss_image_weight": 7}, where="model")
    with pytest.raises(ConfigError, match="did you mean 'axial_row'"):
        decode(DALLEConfig, {"dim": 8, "depth": 1, "attn_types": ["axial_roww"]}, where="model")


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"filter_thres": 1.0}, {"top_p": 0.0}, {"cond_scale": -1}])
def test_sampling_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError):
        decode(DALLESampling, wrong, where="sampling")
