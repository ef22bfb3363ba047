"""The rotary table restated, and that nothing can cast it."""

import math

import pytest
import torch

from tokscale.nn.config import StackConfig
from tokscale.nn.layout import TokenLayout
from tokscale.nn.rotary import rotary_table, rotate, rotate_by_parts
from tokscale.nn.stack import Stack

LAYOUT = TokenLayout(4, 3, 5)


def angle(position: int, pair: int, dim_head: int) -> float:
    """Angle of a channel pair: thirds for the text axis, the row and the column."""
    axis = dim_head // 3
    per_axis, (which, index) = axis // 2, divmod(pair, axis // 2)
    if which == 0:
        place = position if position < LAYOUT.text else 8192
        return place / 10000 ** (2 * index / axis)
    frequency = math.pi * (1 + 4 * index / (per_axis - 1))
    if position < LAYOUT.text:
        return -10 * frequency
    row, column = divmod(position - LAYOUT.text, LAYOUT.grid_w)
    place = -1 + 2 * row / (LAYOUT.grid_h - 1) if which == 1 else -1 + 2 * column / (LAYOUT.grid_w - 1)
    return place * frequency


@pytest.mark.parametrize("dim_head", [16, 64])
def test_the_table_is_the_seeds(dim_head: int):
    table = torch.view_as_complex(rotary_table(LAYOUT, dim_head))
    pairs = 3 * (dim_head // 3 // 2)
    assert table.shape == (LAYOUT.seq, dim_head // 2) and table.dtype == torch.complex64
    expected = torch.tensor(
        [[angle(position, pair, dim_head) for pair in range(pairs)] for position in range(LAYOUT.seq)],
        dtype=torch.float64,
    )
    found = table[:, :pairs]
    # 8192 rad * frequency is known to float32's last bit only
    assert (found - torch.polar(torch.ones_like(expected), expected)).abs().max() < 2e-3
    assert torch.equal(table[:, pairs:], torch.ones(LAYOUT.seq, dim_head // 2 - pairs, dtype=torch.complex64))


def test_pairs_of_neighbouring_channels_turn():
    x = torch.randn(2, LAYOUT.seq, 3, 16)
    table = rotary_table(LAYOUT, 16)
    cos, sin = (part.repeat_interleave(2, dim=-1)[:, None] for part in table.unbind(-1))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    assert torch.allclose(rotate(x, table), x * cos + turned * sin, atol=1e-6)


def test_casting_a_stack_does_not_cast_the_angles():
    config = StackConfig(dim=16, depth=1, heads=1, dim_head=16)
    stack = Stack(config, LAYOUT)
    exact = rotary_table(LAYOUT, 16).clone()
    stack.bfloat16().to(torch.float16)
    assert not list(stack.buffers())
    assert torch.equal(rotary_table(LAYOUT, 16), exact)


def test_a_constructor_that_casts_does_not_reach_the_table(monkeypatch):
    """As DeepSpeed's `zero.Init` does to float constructors while a model is built."""
    exact = rotary_table(TokenLayout(4, 3, 6), 16).clone()
    rotary_table.cache_clear()
    for name in ("linspace", "arange", "full", "zeros", "ones", "empty"):
        constructor = getattr(torch, name)

        def casting(*args, constructor=constructor, **options):
            made = constructor(*args, **options)
            return made.bfloat16() if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, casting)
    stack = Stack(StackConfig(dim=16, depth=1, heads=1, dim_head=16), TokenLayout(4, 3, 6))
    monkeypatch.undo()
    stack.float()(torch.randn(1, 9, 16))
    assert torch.equal(rotary_table(TokenLayout(4, 3, 6), 16, torch.device("cpu")), exact)


def test_low_precision_inputs_are_turned_in_float32():
    x, table = torch.randn(1, LAYOUT.seq, 2, 64), rotary_table(LAYOUT, 64)
    found = rotate(x.bfloat16(), table)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rotate(x.bfloat16().float(), table).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_real_and_complex_arithmetic_turn_alike(dtype):
    x = torch.randn(2, LAYOUT.seq, 3, 16, dtype=dtype)
    table, grad = rotary_table(LAYOUT, 16), torch.randn_like(x)
    found = []
    for turn in (rotate, rotate_by_parts):
        given = x.clone().requires_grad_()
        out = turn(given, table)
        out.backward(grad)
        found.append((out, given.grad))
    (out, given), (by_parts, given_by_parts) = found
    # Where a processor joins a product and a sum into one operation, the last digit may be another.
    torch.testing.assert_close(by_parts, out)
    torch.testing.assert_close(given_by_parts, given)
