"""GEGLU in one pass against its formula."""

import pytest
import torch
import torch.nn.functional as F

from tokscale.base import rng
from tokscale.nn.gated import empty_rows, gated


@pytest.mark.parametrize("active", [0, 1])
@pytest.mark.parametrize("width", [6, 16])
def test_values_and_gradients_are_those_of_the_formula(width, active):
    x = torch.randn(2, 3, 2 * width, dtype=torch.float64, generator=rng.generator(0, "x"), requires_grad=True)
    halves = x.chunk(2, dim=-1)
    ours, formula = gated(x, active=active), halves[1 - active] * F.gelu(halves[active])
    assert torch.equal(ours, formula)
    weights = torch.linspace(-1, 2, ours.numel(), dtype=torch.float64).view_as(ours)
    found, wanted = (torch.autograd.grad((out * weights).sum(), x, retain_graph=True) for out in (ours, formula))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_are_checked_by_differences():
    x = torch.randn(2, 10, dtype=torch.float64, generator=rng.generator(0, "x"), requires_grad=True)
    assert torch.autograd.gradcheck(lambda hidden: gated(hidden, active=1), x)


@pytest.mark.parametrize("dtype,step", [(torch.float32, 16), (torch.bfloat16, 32)])
def test_rows_begin_at_64_bytes(dtype, step):
    out = empty_rows(torch.empty(0, dtype=dtype), (2, 3, 5))
    assert out.shape == (2, 3, 5) and out.stride(1) == step and out.dtype == dtype
