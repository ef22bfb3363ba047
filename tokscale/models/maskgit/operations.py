"""Operations of the layers with backward passes of their own: the same numbers in fewer and faster passes."""

from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from tokscale.base.shapes import Float, Tensor
from tokscale.nn.gated import empty_rows
from tokscale.nn.regions import region


class AlignedLinear(nn.Linear):
    """A linear layer without bias whose outputs, of whatever width, begin each row at a multiple of 64 bytes.

    Two thirds of four times a width are seldom a round number, and matrix products write rows that begin anywhere half
    as fast: 98 ms in the place of 60 for 2,048 rows of 2,730 (one thread, AVX-512). The weight stays as it is.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows out"]:
        """As `nn.Linear`; with autocast, which chooses types by operation, it is that."""
        device = input.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return super().forward(input)
        # Two functions, since a recomputation (`recomputed`) ends when all that the backward pass reads is there again:
        # before the product, which one function would have to compute first.
        promised = _Factors.apply(input, self.weight)
        return cast(Tensor, _Product.apply(promised, input.detach(), self.weight.detach()))


class _Factors(torch.autograd.Function):
    """Gradients of a product, whose value is computed afterwards: here it is a number that stands for all of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros(()).expand(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator loses the name of `ctx`
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _product(rows, weight).unflatten(0, x.shape[:-1]) if wants_x else None,
            _product(rows.t(), x.flatten(0, -2)).contiguous() if wants_weight else None,
        )


class _Product(torch.autograd.Function):
    """The value of a product; its gradient is that of what was promised."""

    @staticmethod
    def forward(ctx: Any, promised: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        del ctx, promised
        return _product(x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # one output has one gradient
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        del ctx
        return grad, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in aligned rows."""
    out = empty_rows(a, (a.shape[0], b.shape[1]))
    return torch.mm(a, b, out=out)


def _unit(x: Tensor) -> Tensor:
    # A backward pass of three operations in the place of ten.
    return cast(Tensor, _Unit.apply(x))


@region(eager=_unit)
def unit(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """Vectors of length one, as `F.normalize`."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _scaled_unit(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return _unit(x) * (first * second)


@region(eager=_scaled_unit)
def scaled_unit(
    x: Float[Tensor, "*rows width"], first: Float[Tensor, " width"], second: Float[Tensor, " width"]
) -> Float[Tensor, "*rows width"]:
    """Vectors of length one, times two scales."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) * (first * second)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        unit = x / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # see above
        ctx: Any, grad: Tensor
    ) -> Tensor:
        unit, length = ctx.saved_tensors
        along = (grad * unit).sum(dim=-1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).div_(length)
