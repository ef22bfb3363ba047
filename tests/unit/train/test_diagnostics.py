"""Groups of parameters, and the entropy of attention against what is known of it."""

import math

import pytest
import torch
from torch import nn

from tokscale.engine.fragments import Master, ParamSlice, parts_of
from tokscale.nn.attention.module import Attention
from tokscale.nn.attention.pattern import AttentionPattern
from tokscale.nn.config import StackConfig
from tokscale.nn.layout import TokenLayout
from tokscale.train.diagnostics import layer_of, spread


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("stack.layers.3.attn.to_qkv.weight", "stack.layers.3"),
        ("text_emb.weight", "text_emb"),
        ("start_token", "start_token"),
        ("decoder.layers.11.ff.norm.weight", "decoder.layers.11"),
    ],
)
def test_a_group_is_a_layer_or_an_outer_module(name, group):
    assert layer_of(name) == group


@pytest.fixture
def attention() -> Attention:
    layout = TokenLayout(4, 2, 2)
    return Attention(
        StackConfig(dim=8, depth=1, heads=2, dim_head=4, rotary_emb=False), AttentionPattern("full", layout)
    )


def entropy(attention: Attention, q: torch.Tensor, k: torch.Tensor, key_mask: torch.Tensor | None = None) -> float:
    found = [spread(attention.weights(sample, q, k, k, key_mask)) for sample in range(len(q))]
    return sum(found) / len(found)


def test_queries_that_see_all_keys_alike_have_the_entropy_of_their_number(attention):
    length = attention.pattern.layout.seq
    nothing = torch.zeros(3, 2, length, 4)
    assert entropy(attention, nothing, nothing) == pytest.approx(
        sum(math.log(seen) for seen in range(1, length + 1)) / length
    )
    # A padded key is seen by nobody.
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[:, 0] = False
    seen = [max(at - 1, 1) for at in range(1, length + 1)]
    assert entropy(attention, nothing, nothing, mask) == pytest.approx(sum(map(math.log, seen)) / length)


def test_queries_that_look_at_one_key_have_none(attention):
    length = attention.pattern.layout.seq
    keys = torch.zeros(1, 2, length, 4)
    keys[:, :, 0, 0] = 1e4
    queries = torch.zeros(1, 2, length, 4)
    queries[..., 0] = 1.0
    assert entropy(attention, queries, keys) == pytest.approx(0.0, abs=1e-6)


def test_pieces_are_cut_where_parameters_begin_and_end():
    a, b, c, d = (nn.Parameter(torch.zeros(n)) for n in (3, 4, 2, 5))
    # The second lies elsewhere; the first master ends in padding; the last is cut.
    lie = [(a, slice(0, 3)), (b, slice(3, 3)), (c, slice(3, 5))]
    first = Master(torch.zeros(8), tuple(ParamSlice(parameter, (0,), 0, place) for parameter, place in lie))
    second = Master(torch.zeros(4), (ParamSlice(d, (5,), 1, slice(0, 4)),))
    values = torch.arange(12.0)
    expected = {a: [0, 1, 2], c: [3, 4], d: [8, 9, 10, 11]}
    for sizes in ([12], [8, 4], [3, 2, 3, 4], [2, 2, 5, 3], [1] * 12):
        found: dict[nn.Parameter, list[float]] = {}
        for parameter, part in parts_of([first, second], values.split(sizes)):
            found.setdefault(parameter, []).extend(part.tolist())
        assert found == expected
