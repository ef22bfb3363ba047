"""RQ-Transformer's options: the original's names, and sizes taken from tokenizers."""

from types import SimpleNamespace

import pytest

from tokscale.base.config import decode, encode
from tokscale.base.errors import ConfigError
from tokscale.models.registry import ModelConfig
from tokscale.models.rqtransformer import HierarchicalConfig, RQTransformerConfig

IMAGE = SimpleNamespace(num_tokens=24, code_shape=(4, 6, 3))
WORDS = SimpleNamespace(num_tokens=20)
SMALL = {"dim": 16, "spatial_layers": 1, "depth_layers": 1}


def test_sizes_come_from_the_tokenizers():
    config = RQTransformerConfig(**SMALL).fitted(IMAGE, WORDS)
    assert (config.codes, config.num_text_tokens, config.lengths) == (24, 20, (24, 3))
    assert config.code_shape == (4, 6, 3) and config.first_grid == (4, 6)
    assert config.fitted(IMAGE, None) == config == decode(ModelConfig, encode(config))
    flat = RQTransformerConfig(**SMALL).fitted(SimpleNamespace(num_tokens=24, code_shape=(4, 6)), WORDS)
    assert flat.lengths == (24, 1)


def test_stages_of_a_hierarchy_come_from_the_tokenizer_or_cut_its_codes():
    rows = HierarchicalConfig(dim=16, depth=(2, 1, 1)).fitted(IMAGE, WORDS)
    assert rows.lengths == rows.code_shape == (4, 6, 3)
    cut = HierarchicalConfig(dim=16, depth=(2, 1), max_seq_len=(8, 9)).fitted(IMAGE, WORDS)
    assert cut.lengths == (8, 9) and cut.code_shape == (4, 6, 3)
    with pytest.raises(ConfigError, match=r"model\.max_seq_len: \[8, 8\] does not cut codes of shape \(4, 6, 3\)"):
        HierarchicalConfig(dim=16, depth=(2, 1), max_seq_len=(8, 8)).fitted(IMAGE, WORDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth_seq_len": 4}, r"model\.depth_seq_len: got 4, but the image tokenizer has 3"),
        ({"max_spatial_seq_len": 25}, r"model\.max_spatial_seq_len: got 25, but the image tokenizer has 24"),
        ({"pad_id": 7}, r"model\.pad_id: 7 is one of the 24 codes"),
    ],
)
def test_what_contradicts_the_tokenizer_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        RQTransformerConfig(**SMALL | options).fitted(IMAGE, WORDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial_layer": 2}, "did you mean 'spatial_layers'"),
        ({"shift_tokens": True, "dim": 18}, "shift_tokens=true needs dim divisible by 4"),
        ({"attn_types": ["axial_roww"]}, "did you mean 'axial_row'"),
        ({"condition": {"kind": "class"}}, "did you mean 'classes'"),
        ({"kind": "hierarchical", "depth": [1, 2], "max_seq_len": [3]}, "give one length each"),
    ],
)
def test_bad_options_name_the_key_and_the_way_out(options, message):
    known = SMALL if options.get("kind") != "hierarchical" else {"dim": 16}
    with pytest.raises(ConfigError, match=message):
        decode(ModelConfig, {"kind": "rqtransformer"} | known | options, where="model")


def test_sizes_that_are_not_known_are_named():
    with pytest.raises(ConfigError, match="max_spatial_seq_len"):
        _ = RQTransformerConfig(**SMALL).lengths
    with pytest.raises(ConfigError, match="num_tokens"):
        _ = RQTransformerConfig(**SMALL).codes
