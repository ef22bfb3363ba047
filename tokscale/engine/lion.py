"""Lion (Chen et al. 2023, arXiv:2302.06675): the sign of an interpolated momentum. Elementwise, so it shards freely."""

from collections.abc import Callable
from typing import Any

import torch

from tokscale.engine.config import LionConfig
from tokscale.engine.optimizer import Slot, optimizer
from tokscale.engine.verdict import GuardedOptimizer


@optimizer(LionConfig)
class Lion(GuardedOptimizer):
    """Lion with decoupled weight decay.

    Wants a learning rate three to ten times below AdamW's, and a weight decay as many times above.
    """

    def __init__(self, params: list[dict[str, Any]], config: LionConfig):
        super().__init__(params, {"lr": config.lr, "betas": config.betas, "weight_decay": 0.0})
        self.config = config

    @classmethod
    def slots(cls, config: LionConfig, shape: tuple[int, ...], group: str) -> tuple[Slot, ...]:
        """One moment."""
        del config, shape, group
        return (Slot("exp_avg"),)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply one update to every parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], self.gradient(parameter)
                self.next_step(state)
                direction = torch.lerp(gradient, state["exp_avg"], beta1).sign_()
                weight = parameter.mul(1 - group["lr"] * group["weight_decay"])
                self.keep(parameter, weight.sub_(direction, alpha=group["lr"]))
                self.keep(state["exp_avg"], state["exp_avg"].lerp(gradient, 1 - beta2))
