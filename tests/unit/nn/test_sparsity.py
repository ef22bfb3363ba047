"""Block layouts: DeepSpeed 0.19.6's own, less what leaked the future; drawn from named streams."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tokscale.base.config import decode, encode
from tokscale.base.errors import ConfigError
from tokscale.nn.attention.blocksparse import block_table
from tokscale.nn.attention.pattern import AttentionPattern
from tokscale.nn.attention.sparsity import BigBirdLayout, BlockGrid, FixedLayout, SparseLayout, VariableLayout
from tokscale.nn.layout import TokenLayout

STORED = np.load(Path(__file__).parents[2] / "assets" / "layouts.npz")
CASES = [json.loads(str(STORED[f"{index}/case"])) for index in range(len(STORED.files) // 2)]
HEADS = 4
LAYOUT = TokenLayout(33, 8, 8)


def theirs(index: int) -> torch.Tensor:
    blocks = CASES[index]["blocks"]
    bits = np.unpackbits(STORED[f"{index}/bits"])[: HEADS * blocks * blocks]
    return torch.from_numpy(bits.reshape(HEADS, blocks, blocks)).bool()


def ours(case: dict) -> torch.Tensor:
    layout = decode(SparseLayout, {"kind": case["kind"]} | case["options"])
    grid = BlockGrid(case["blocks"], HEADS, text_blocks=3, causal=case["causal"])
    return layout.make(grid, random.Random(case["seed"]))


def test_the_stored_layouts_cover_every_kind():
    assert {case["kind"] for case in CASES} == {
        "dense", "fixed", "variable", "bigbird", "bslongformer", "local_sliding_window",
    }  # fmt: skip
    assert len(CASES) > 60


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: f"{CASES[index]['kind']}-{index}")
def test_layouts_are_deepspeeds(index: int):
    case, stored = CASES[index], theirs(index)
    assert torch.equal(ours(case), stored.tril() if case["causal"] else stored)


def test_deepspeeds_own_causal_layouts_leaked_the_future():
    leaking = {case["kind"] for index, case in enumerate(CASES) if case["causal"] and theirs(index).triu(1).any()}
    assert leaking == {"dense", "fixed", "variable"}


def test_bigbird_draws_what_there_is_where_a_row_has_fewer_blocks():
    table = BigBirdLayout(num_random_blocks=3).make(BlockGrid(8, 1, 1, causal=True), random.Random(0))
    assert table[0, 0].tolist() == [True] + [False] * 7


def pattern(stream: int = 0, **options) -> AttentionPattern:
    sparse = VariableLayout(block=4, num_random_blocks=3, **options)
    return AttentionPattern("sparse", LAYOUT, heads=2, sparse=sparse, stream=stream)


def test_random_blocks_follow_their_own_stream_and_nothing_else():
    first = block_table(pattern(), "cpu")
    random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(first, block_table(AttentionPattern(**vars(pattern())), "cpu"))
    assert not torch.equal(first, block_table(pattern(stream=1), "cpu"))
    assert not torch.equal(first, block_table(pattern(seed=1), "cpu"))


def test_the_seed_of_the_stream_travels_with_the_config():
    sparse = VariableLayout(seed=7)
    assert decode(SparseLayout, encode(sparse)) == sparse


def test_global_blocks_follow_the_real_text_length():
    for text, expected in ((1, 1), (16, 1), (17, 2), (40, 3)):
        shape = AttentionPattern("sparse", TokenLayout(text, 8, 8), sparse=VariableLayout(num_random_blocks=0))
        last_row = block_table(shape, "cpu")[0, -1]
        assert last_row[:expected].all()
        assert not last_row[expected : expected + 1].any()


def test_a_length_that_is_no_multiple_of_the_block_needs_no_padding():
    shape = AttentionPattern("sparse", TokenLayout(5, 3, 3), sparse=FixedLayout(block=4))
    assert shape.dense(14, "cpu").shape == (1, 14, 14)


def test_the_future_is_never_seen_even_inside_a_block():
    mask = pattern().dense(LAYOUT.seq, "cpu")
    assert not mask.triu(1).any()
    assert mask.diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fixed", "num_local_blocks": 5, "num_global_blocks": 2}, "num_local_blocks=5 is not a multiple"),
        ({"kind": "fixed", "num_different_global_patterns": 2}, "give sparse.different_layout_per_head=true"),
        ({"kind": "variable", "global_block_indices": [3], "global_block_end_indices": [2]}, "must lie beyond"),
        ({"kind": "variable", "global_block_indices": [3], "global_block_end_indices": [4, 5]}, "2 ends for 1"),
        ({"kind": "bigbrid"}, "did you mean 'bigbird'"),
        ({"kind": "bigbird", "num_rand": 3}, "unknown key"),
    ],
)
def test_bad_options_are_config_errors(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        decode(SparseLayout, options, where="sparse")


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        (VariableLayout(num_random_blocks=99), "num_random_blocks: got 99, but the sequence has only 7 blocks"),
        (FixedLayout(horizontal_global_attention=True), "only a bidirectional stack"),
    ],
)
def test_a_layout_that_does_not_fit_the_sequence_is_refused_before_any_weight(sparse, message: str):
    with pytest.raises(ConfigError, match=message):
        AttentionPattern("sparse", LAYOUT, sparse=sparse)
