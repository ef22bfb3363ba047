"""Lion (Chen et al. 2023, arXiv:2302.06675): the sign of an interpolated momentum. Elementwise, so it shards freely."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Lion with decoupled weight decay; one moment, `exp_avg`.

    Wants a learning rate three to ten times below AdamW's, and a weight decay as many times above.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float]):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply one update to every parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                direction = torch.lerp(parameter.grad, state["exp_avg"], beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(direction, alpha=group["lr"])
                state["exp_avg"].lerp_(parameter.grad, 1 - beta2)
