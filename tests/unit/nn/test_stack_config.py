"""Bad options are errors of the configuration, before any weight is made."""

import pytest

from tokscale.base.config import decode, encode
from tokscale.base.errors import ConfigError
from tokscale.nn.config import StackConfig

SMALL = {"dim": 32, "depth": 4}


def test_the_seeds_defaults():
    config = StackConfig(dim=32, depth=2)
    assert (config.heads, config.dim_head, config.ff_mult) == (8, 64, 4)
    assert config.attn_types == ("full",) and config.rotary_emb and not config.shift_tokens


def test_attention_types_cycle_over_the_depth():
    config = decode(StackConfig, SMALL | {"attn_types": ["full", "axial_row", "axial_col"]})
    assert config.layer_types() == ("full", "axial_row", "axial_col", "full")


def test_one_attention_type_may_be_given_as_a_word():
    assert decode(StackConfig, SMALL | {"attn_types": "full"}).attn_types == ("full",)


def test_shared_ids_cycle_over_the_depth():
    config = decode(StackConfig, SMALL | {"shared_attn_ids": [0, "b"], "shared_ff_ids": 1})
    assert config.attn_ids() == (0, "b", 0, "b")
    assert config.ff_ids() == (1, 1, 1, 1)


def test_it_survives_json():
    config = decode(StackConfig, SMALL | {"sparse": {"kind": "fixed", "block": 64}, "shared_attn_ids": [1, 2]})
    assert decode(StackConfig, encode(config)) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_types": ["full", "axial_roww"]}, r"attn_types\[1\]: got 'axial_roww'; did you mean 'axial_row'\?"),
        ({"attn_types": []}, "attn_types: got an empty list"),
        ({"kernel_size": 4}, "kernel_size: got 4; the window needs a middle, so an odd size such as 5"),
        ({"reversible": True, "remat": "block"}, "reversible=true cannot honour remat='block'"),
        (
            {"attn_types": ["full", "axial_row"], "shared_attn_ids": [0]},
            "layers 0 and 1 share id 0, but attn_types makes them 'full' and 'axial_row'",
        ),
        ({"shift_tokens": True, "dim": 30}, "shift_tokens=true needs dim divisible by 4, got dim=30"),
        ({"dim_head": 5}, "rotary_emb=true needs an even dim_head of at least 6, got 5"),
        ({"attn_dropout": 1.5}, "attn_dropout: got 1.5"),
        ({"sparse": {"kind": "fixd"}}, r"sparse.kind: got 'fixd'; did you mean 'fixed'\?"),
        ({"heds": 2}, r"heds: unknown key; did you mean 'heads'\?"),
    ],
)
def test_bad_options_name_the_key_the_value_and_the_way_out(options, message):
    with pytest.raises(ConfigError, match=message):
        decode(StackConfig, SMALL | options)
