"""Which query sees which key, against definitions written as loops."""

import itertools

import pytest
import torch

from tokscale.base.errors import ConfigError
from tokscale.nn.attention.pattern import KINDS, AttentionPattern
from tokscale.nn.layout import TokenLayout

LAYOUT = TokenLayout(5, 4, 6)


def brute_force(pattern: AttentionPattern, sees_in_image) -> torch.Tensor:
    layout = pattern.layout
    mask = torch.zeros(layout.seq, layout.seq, dtype=torch.bool)
    for query, key in itertools.product(range(layout.seq), repeat=2):
        if pattern.causal and key > query:
            continue
        if key < layout.text:
            mask[query, key] = True
        elif query >= layout.text:
            (row, column), (key_row, key_column) = (
                divmod(position - layout.text, layout.grid_w) for position in (query, key)
            )
            mask[query, key] = sees_in_image(row - key_row, column - key_column)
    return mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("kind", "near"),
    [("axial_row", lambda down, right: down == 0), ("axial_col", lambda down, right: right == 0)],
)
def test_axial_kinds_see_the_text_and_their_own_line(kind, near, causal):
    pattern = AttentionPattern(kind, LAYOUT, causal)
    assert torch.equal(pattern.dense(LAYOUT.seq, "cpu")[0], brute_force(pattern, near))


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (3, 2), (5, 1)])
def test_the_originals_window_is_the_quadrant_above_and_to_the_left(kernel, dilation):
    pattern = AttentionPattern("conv_like", LAYOUT, kernel_size=kernel, dilation=dilation)
    steps = {step * dilation for step in range(kernel)}
    expected = brute_force(pattern, lambda down, right: down in steps and right in steps)
    assert torch.equal(pattern.dense(LAYOUT.seq, "cpu")[0], expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (5, 1)])
def test_the_centered_window_has_its_query_in_the_middle(kernel, dilation, causal):
    pattern = AttentionPattern(
        "conv_like", LAYOUT, causal, kernel_size=kernel, dilation=dilation, conv_window="centered"
    )
    steps = {step * dilation for step in range(-(kernel // 2), kernel // 2 + 1)}
    expected = brute_force(pattern, lambda down, right: down in steps and right in steps)
    assert torch.equal(pattern.dense(LAYOUT.seq, "cpu")[0], expected)
    above_right = LAYOUT.text + LAYOUT.grid_w * dilation, LAYOUT.text + dilation
    assert expected[above_right]


def test_full_is_a_triangle_or_everything():
    assert torch.equal(AttentionPattern("full", LAYOUT).dense(9, "cpu")[0], torch.ones(9, 9).tril().bool())
    assert AttentionPattern("full", LAYOUT, causal=False).dense(9, "cpu").all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_shorter_sequence_has_the_corner_of_the_mask(kind):
    pattern = AttentionPattern(kind, LAYOUT)
    assert torch.equal(pattern.dense(17, "cpu"), pattern.dense(LAYOUT.seq, "cpu")[:, :17, :17])


@pytest.mark.parametrize("kind", KINDS)
def test_every_query_sees_itself_and_in_a_causal_pattern_nothing_later(kind):
    mask = AttentionPattern(kind, LAYOUT).dense(LAYOUT.seq, "cpu")
    assert not mask.triu(1).any() and mask.diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.needs_grid])
@pytest.mark.parametrize("causal", [True, False])
def test_kinds_of_the_grid_see_all_text_and_text_sees_text(kind, causal):
    pattern = AttentionPattern(kind, LAYOUT, causal, conv_window="centered")
    mask, text = pattern.dense(LAYOUT.seq, "cpu")[0], LAYOUT.text
    assert mask[text:, :text].all() and not mask[:text, text:].any()
    assert torch.equal(mask[:text, :text], torch.ones(text, text, dtype=torch.bool).tril(0 if causal else text))


def test_pairs_of_a_row_kind_are_a_triangle_a_rectangle_and_a_triangle_for_each_row():
    pattern = AttentionPattern("axial_row", LAYOUT)
    assert pattern.pairs(LAYOUT.seq) == 5 * 6 // 2 + 24 * 5 + 4 * 6 * 7 // 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [LAYOUT.seq, 17, 3])
def test_pairs_count_the_mask(kind, length):
    pattern = AttentionPattern(kind, LAYOUT, heads=2)
    zero, count = torch.zeros((), dtype=torch.long), 0
    sees = pattern.mask_mod("cpu")
    for head, query, key in itertools.product(range(2), range(length), range(length)):
        count += bool(sees(zero, torch.tensor(head), torch.tensor(query), torch.tensor(key)))
    assert pattern.pairs(length) == count // 2


def test_heads_are_told_apart_only_by_sparse_patterns():
    assert AttentionPattern("axial_row", LAYOUT, heads=4).dense(9, "cpu").shape == (1, 9, 9)
    assert AttentionPattern("sparse", LAYOUT, heads=4).dense(9, "cpu").shape == (4, 9, 9)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.needs_grid])
def test_image_kinds_need_an_image(kind):
    with pytest.raises(ConfigError, match=f"'{kind}' needs an image grid"):
        AttentionPattern(kind, TokenLayout(8))


def test_a_direction_that_a_kind_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"use model\.conv_window=centered"):
        AttentionPattern("conv_like", LAYOUT, causal=False)


@pytest.mark.parametrize("sizes", [(-1, 2, 2), (3, 0, 4), (0, 0, 0)])
def test_an_impossible_layout_is_refused(sizes):
    with pytest.raises(ConfigError, match="token layout"):
        TokenLayout(*sizes)
