"""Stage 0: nothing is divided; the torch optimizer moves the parameters themselves."""

from typing import Any

from torch import Tensor, nn

from tokscale.engine.fragments import Master, StateTensor, frozen_states, whole_master
from tokscale.engine.optimizer import ShardedOptimizer


class WholeLayout:
    """See `Layout`."""

    replicated = True

    def __init__(self, engine: Any):
        self._model: nn.Module = engine.module
        self.optimizer: ShardedOptimizer = engine.basic_optimizer

    def masters(self) -> list[Master]:
        """The parameters themselves."""
        return [whole_master(parameter) for group in self.optimizer.param_groups for parameter in group["params"]]

    def frozen(self) -> list[StateTensor]:
        """Whole on every rank."""
        return frozen_states(self._model)

    def gradients(self) -> list[Tensor]:
        """The gradients of the parameters that were used."""
        return [
            parameter.grad
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    def clear_gradients(self) -> None:
        """Nothing remains."""

    def refresh_model_params(self) -> None:
        """The masters are the parameters."""
