"""GEGLU with a backward pass of its own: the same numbers in fewer passes over memory."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from tokscale.base.shapes import Float, Tensor

_ROW_BYTES = 64


def gated(hidden: Float[Tensor, "*rows two_width"], *, active: int) -> Float[Tensor, "*rows width"]:
    """One half of each row times the GELU of the other (arXiv:2002.05202).

    Both halves' gradients are written into one tensor, where `chunk` and a product would make two and join them.

    Args:
        hidden: Both halves.
        active: Which of them goes through GELU, 0 or 1.
    """
    return cast(Tensor, _Gated.apply(hidden, active))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, active: int) -> Tensor:
        halves = hidden.chunk(2, dim=-1)
        opened = F.gelu(halves[active])
        ctx.save_for_backward(hidden, opened)
        ctx.active = active
        return halves[1 - active] * opened

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator loses the name of `ctx`
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        hidden, opened = ctx.saved_tensors
        halves, out = hidden.chunk(2, dim=-1), empty_rows(hidden, tuple(hidden.shape))
        to = out.chunk(2, dim=-1)
        torch.mul(grad, opened, out=to[1 - ctx.active])
        through = grad * halves[1 - ctx.active]
        torch.ops.aten.gelu_backward.grad_input(through, halves[ctx.active], grad_input=to[ctx.active])
        return out, None


def empty_rows(like: Float[Tensor, "..."], shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """An empty tensor of the type of another, whose rows begin at multiples of 64 bytes."""
    step = _ROW_BYTES // like.element_size()
    return like.new_empty(*shape[:-1], -(-shape[-1] // step) * step)[..., : shape[-1]]
