"""What a step may do, decided on the device: nothing reads the gradient's norm before the update is queued.

Optimizers are told as torch's `GradScaler` tells them: the attributes `grad_scale`, by which each gradient is divided,
and `found_inf`, 1 when the step must change nothing, are tensors of the device. torch's fused optimizers know both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tokscale.base.log import logger
from tokscale.dist.message import Message
from tokscale.engine.optimizer import ShardedOptimizer

SQUARES, UNUSABLE = "engine/squares", "engine/unusable"
"""In a step's message: the squared norm of a rank's share of the gradient, and whether its losses are not finite."""

log = logger("engine")


@dataclass(frozen=True)
class Verdict:
    """What all ranks agree on about one accumulated gradient, as tensors of the device."""

    norm: Tensor
    """Global L2 norm before clipping, float64."""
    found_inf: Tensor
    """1 when the norm or a loss of any rank is not finite, else 0; float32, as torch's fused optimizers want it."""

    @staticmethod
    def of(message: Message) -> "Verdict":
        """What a message says, read on the device."""
        norm = message.total(SQUARES).sqrt()
        finite = norm.isfinite() & (message.total(UNUSABLE) == 0)
        return Verdict(norm, (~finite).float())

    def grad_scale(self, limit: float) -> Tensor | None:
        """What to divide the gradient by so that its norm is at most `limit`; None when there is no limit."""
        return ((self.norm + 1e-6) / limit).clamp(min=1.0).float() if limit else None


class GuardedOptimizer(ShardedOptimizer):
    """Base of our own optimizers: updates that take `grad_scale` and `found_inf` without a look at either.

    A step computes new values aside and hands them to `keep`, which stores them or the old ones. Scaling a new value by
    zero would not do: zero times NaN is NaN.
    """

    counts_on_device = True
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def gradient(self, parameter: Tensor) -> Tensor:
        """The gradient of a parameter, scaled in place as asked for."""
        assert parameter.grad is not None
        return parameter.grad if self.grad_scale is None else parameter.grad.div_(self.grad_scale)

    def keep(self, old: Tensor, new: Tensor) -> None:
        """Store `new` in `old`, unless the step must change nothing."""
        if self.found_inf is None:
            old.copy_(new)
        else:
            torch.where(self.found_inf > 0, old, new, out=old)

    def next_step(self, state: dict[str, Any]) -> Tensor:
        """Count an update if it changes anything; the number it has if so, as a float64 tensor."""
        number = state["step"].double() + 1
        state["step"] += 1 if self.found_inf is None else 1 - self.found_inf
        return number


def guarded(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer, honouring `grad_scale` and `found_inf` at the price of a wait if it does not by itself."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        return optimizer
    log.warning(
        "%s does not take found_inf on the device: each update waits for the step's message", type(optimizer).__name__
    )
    told, plain = cast(Any, optimizer), cast(Callable[..., Any], optimizer.step)

    def step(closure: None = None) -> None:
        del closure
        if told.found_inf > 0:
            return
        gradients = [data.grad for group in told.param_groups for data in group["params"] if data.grad is not None]
        scale, found = told.grad_scale, told.found_inf
        if scale is not None and gradients:
            torch._foreach_div_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
        told.grad_scale = told.found_inf = None  # some of torch's own refuse them unless they are fused
        try:
            plain()
        finally:
            told.grad_scale, told.found_inf = scale, found

    told.step = step
    return optimizer


def instruct(optimizer: torch.optim.Optimizer, verdict: Verdict, limit: float, device: torch.device) -> None:
    """Tell an optimizer, whose masters lie on `device`, what its next update may do."""
    told, scale = cast(Any, optimizer), verdict.grad_scale(limit)
    told.found_inf = verdict.found_inf.to(device)
    told.grad_scale = None if scale is None else scale.to(device)
