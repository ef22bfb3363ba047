"""How positions are reordered so that FlexAttention's blocks of 128 can be skipped. The kernel itself is a GPU's."""

import pytest
import torch

from tokscale.nn.attention import flex
from tokscale.nn.attention.layouts import FixedLayout
from tokscale.nn.attention.pattern import AttentionPattern
from tokscale.nn.attention.reference import dense_attention
from tokscale.nn.layout import TokenLayout

LAYOUT = TokenLayout(70, 16, 16)


@pytest.mark.parametrize("kind", ["full", "axial_row", "axial_col", "conv_like"])
@pytest.mark.parametrize("length", [LAYOUT.seq, LAYOUT.seq - 1, 71, 40])
def test_the_reordered_mask_is_the_pattern(kind: str, length: int):
    pattern = AttentionPattern(kind, LAYOUT)
    order = flex.token_order(pattern, length)
    assert sorted(order[order >= 0].tolist()) == list(range(length))
    slots = torch.arange(len(order))
    zero = torch.zeros((), dtype=torch.long)
    seen = flex.mask_function(pattern, order)(zero, zero, slots[:, None], slots[None])
    expected = torch.zeros(len(order), len(order), dtype=torch.bool)
    real = (order >= 0).nonzero().flatten()
    places = order[real]
    expected[real[:, None], real] = pattern.dense(length, "cpu")[0][places[:, None], places]
    assert torch.equal(seen, expected)


def test_columns_become_contiguous():
    pattern = AttentionPattern("axial_col", TokenLayout(128, 32, 32))
    raster = torch.arange(pattern.layout.seq)
    assert flex.live_blocks(pattern, raster) == 45  # all of the triangle
    assert flex.live_blocks(pattern, flex.token_order(pattern, len(raster))) == 17


def test_the_text_is_padded_to_a_block_where_that_saves_blocks():
    pattern = AttentionPattern("axial_row", TokenLayout(257, 64, 64))
    order = flex.token_order(pattern, pattern.layout.seq)
    assert len(order) == 384 + 4096
    full = AttentionPattern("full", TokenLayout(257, 64, 64))
    assert len(flex.token_order(full, full.layout.seq)) == 257 + 4096


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [{"kind": "axial_col"}, {"kind": "sparse", "sparse": FixedLayout(block=16)}], ids=["col", "sparse"]
)
def test_compiled_attention_is_the_oracle(options: dict):
    pattern = AttentionPattern(layout=LAYOUT, heads=2, **options)
    q, k, v = torch.randn(3, 1, 2, LAYOUT.seq, 32).unbind()
    with torch.no_grad():
        found = flex.block_attention(q, k, v, pattern)
    assert (found - dense_attention(q, k, v, pattern)).abs().max() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["axial_row", "axial_col", "conv_like", "sparse"])
def test_gradients_on_a_gpu_are_the_oracles(kind: str):
    pattern = AttentionPattern(kind, LAYOUT, heads=2)
    q, k, v = (torch.randn(1, 2, LAYOUT.seq, 32, device="cuda", requires_grad=True) for _ in range(3))
    weight = torch.randn_like(q)
    found, expected = (
        torch.autograd.grad(run(q, k, v, pattern), (q, k, v), weight) for run in (flex.block_attention, dense_attention)
    )
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-2 * other.norm()
