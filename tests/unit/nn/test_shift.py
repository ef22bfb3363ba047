"""Token shift, against a loop over positions."""

import pytest
import torch

from tokscale.nn.layout import TokenLayout
from tokscale.nn.shift import shift_tokens

LAYOUT = TokenLayout(5, 3, 4)


def by_loops(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    half, quarter = x.shape[2] // 2, x.shape[2] // 4
    out = x.clone()
    for position in range(x.shape[1]):
        if position < layout.text:
            out[:, position, :half] = x[:, position - 1, :half] if position else 0
            continue
        row, column = divmod(position - layout.text, layout.grid_w)
        out[:, position, :quarter] = x[:, position - layout.grid_w, :quarter] if row else 0
        out[:, position, quarter:half] = x[:, position - 1, quarter:half] if column else 0
    return out


@pytest.mark.parametrize("length", range(1, LAYOUT.seq + 1))
def test_any_length_shifts_alike_text_alone_too(length: int):
    x = torch.randn(2, length, 8)
    assert torch.equal(shift_tokens(x, LAYOUT), by_loops(x, LAYOUT))


@pytest.mark.parametrize("layout", [TokenLayout(0, 3, 4), TokenLayout(6), TokenLayout(1, 1, 7), TokenLayout(3, 5, 1)])
def test_any_layout(layout: TokenLayout):
    x = torch.randn(2, layout.seq, 8)
    assert torch.equal(shift_tokens(x, layout), by_loops(x, layout))


def test_the_memory_holds_unshifted_tokens():
    x = torch.randn(2, LAYOUT.seq, 8)
    history, parts, start = torch.zeros(2, 4, 4), [], 0
    for new in (3, 5, 1, 1, 4, 3):
        parts.append(shift_tokens(x[:, start : start + new], LAYOUT, offset=start, history=history))
        start += new
        expected = torch.nn.functional.pad(x[:, :start, :4], (0, 0, 4, 0))[:, -4:]
        assert torch.equal(history, expected)
    assert torch.equal(torch.cat(parts, dim=1), by_loops(x, LAYOUT))


@pytest.mark.parametrize("layout", [LAYOUT, TokenLayout(0, 3, 4), TokenLayout(1, 1, 7), TokenLayout(3, 5, 1)])
def test_one_position_at_a_time(layout: TokenLayout):
    x, history = torch.randn(2, layout.seq, 8), torch.zeros(2, layout.grid_w, 4)
    steps = [shift_tokens(x[:, [at]], layout, offset=at, history=history) for at in range(layout.seq)]
    assert torch.equal(torch.cat(steps, dim=1), by_loops(x, layout))


def test_gradients_come_from_where_the_channels_went():
    x = torch.randn(1, LAYOUT.seq, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: shift_tokens(x, LAYOUT), (x,))
