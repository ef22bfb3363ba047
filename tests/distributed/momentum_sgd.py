"""An optimizer from outside: plain SGD with momentum. All of it is here; importing this module adds it."""

from typing import Any, Literal

import torch

from tokscale.engine.optimizer import AnyOptimizerConfig, ShardedOptimizer, Slot, optimizer


class SGDConfig(AnyOptimizerConfig):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = 0.9
    """Decay of the sum of gradients."""


@optimizer(SGDConfig)
class SGD(torch.optim.SGD, ShardedOptimizer):  # pyright: ignore[reportIncompatibleMethodOverride]
    def __init__(self, params: list[dict[str, Any]], config: SGDConfig):
        super().__init__(params, lr=config.lr, momentum=config.momentum)
        self.config = config

    @classmethod
    def slots(cls, config: SGDConfig, shape: tuple[int, ...], group: str) -> tuple[Slot, ...]:
        return (Slot("momentum_buffer"),)
