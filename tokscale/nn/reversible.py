"""Two residual streams that are recomputed from the output, so that no activation is kept (arXiv:1707.04585).

The backward pass runs every function forward once more, by its module's `__call__`, and then a backward pass of
its own through it. To an engine that gathers partitioned parameters by module hooks this looks like activation
checkpointing. Functions that several layers share see several backward passes a step, which such an engine must be
told of: `ParameterAccess.accumulating`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from tokscale.base.protocols import ParameterAccess, current
from tokscale.base.shapes import Float, Tensor


@dataclass(frozen=True)
class ResidualBranch:
    """One residual update: `a += run(b)`."""

    run: Callable[[Tensor], Tensor]
    """A pure function of its input and of parameters, but for the default random generators."""
    shared: tuple[nn.Parameter, ...] = ()
    """Parameters that other branches use too."""
    last: bool = True
    """This is the last of the branches that share them, in backward order."""
    stochastic: bool = False
    """It draws from the default generators (dropout), so their state must be kept for the second run."""


def run_reversible(
    x: Float[Tensor, "batch seq dim"], branches: Sequence[ResidualBranch]
) -> Float[Tensor, "batch seq dim"]:
    """Run both streams, each starting as `x`, through `branches` alternately; the mean of the two.

    The streams are float32 even for a low-precision `x`: subtracting what was added must give back the input.
    """
    if not torch.is_grad_enabled():
        return run_plain(x, branches)
    stream = residual_stream(x)
    # Without an input that needs a gradient the output would need none either, whatever the parameters.
    anchor = torch.empty(0, device=x.device, requires_grad=True)
    first, second = _Reversible.apply(stream, stream, anchor, tuple(branches), x.dtype)
    return ((first + second) / 2).to(x.dtype)


def run_plain(x: Float[Tensor, "batch seq dim"], branches: Sequence[ResidualBranch]) -> Float[Tensor, "batch seq dim"]:
    """The same function with every activation kept: what `run_reversible` is tested against."""
    first = second = residual_stream(x)
    for branch in branches:
        first, second = _update(first, second, branch, x.dtype)
    return ((first + second) / 2).to(x.dtype)


def residual_stream(x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
    """`x` in the precision that streams are kept in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _update(a: Tensor, b: Tensor, branch: ResidualBranch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One step; the streams change places for the next one."""
    return b, a + branch.run(b.to(dtype))


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, anchor: Tensor, branches: tuple[ResidualBranch, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.branches, ctx.dtype = branches, dtype
        ctx.modes = _AutocastModes.current(a.device)
        ctx.random = []
        for branch in branches:
            ctx.random.append(_random_state(a.device) if branch.stochastic else None)
            a, b = _update(a, b, branch, dtype)
        ctx.save_for_backward(a, b)
        return a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b = ctx.saved_tensors
        grad_a, grad_b = gradients
        for branch, state in zip(reversed(ctx.branches), reversed(ctx.random), strict=True):
            a, b, grad_a, grad_b = b, a, grad_b, grad_a  # as before the step: `a` is the stream that it added to
            given = b.detach().requires_grad_()
            with torch.enable_grad(), ctx.modes.entered(), _replayed(state, given.device):
                added = branch.run(given.to(ctx.dtype))
            sharing = current(ParameterAccess).accumulating(branch.shared, last=branch.last)
            with sharing if branch.shared else nullcontext():
                torch.autograd.backward(added, grad_a.to(added.dtype))
            assert given.grad is not None
            a = a - added.detach()
            grad_b = grad_b + given.grad
        return grad_a, grad_b, None, None, None


@dataclass(frozen=True)
class _AutocastModes:
    """Autocast as it was in the forward pass; a backward pass runs without it."""

    modes: tuple[tuple[str, torch.dtype, bool], ...] = field(default=())

    @classmethod
    def current(cls, device: torch.device) -> "_AutocastModes":
        kinds = dict.fromkeys(("cpu", device.type))
        return cls(tuple((kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds))

    @contextmanager
    def entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype, enabled in self.modes:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), own


@contextmanager
def _replayed(state: tuple[Tensor, Tensor | None] | None, device: torch.device) -> Iterator[None]:
    if state is None:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.get_device_module(device).set_rng_state(state[1], device)
        yield
