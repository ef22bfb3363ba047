"""The questions that a ZeRO layout answers."""

from typing import Protocol

from torch import Tensor

from tokscale.engine.fragments import Master, StateTensor
from tokscale.engine.optimizer import ShardedOptimizer


class Layout(Protocol):
    """How one ZeRO stage stores masters, moments and gradients. Everything here is private to DeepSpeed."""

    optimizer: ShardedOptimizer
    """The torch optimizer that moves the masters."""
    replicated: bool
    """True when masters are whole parameters on every rank."""

    def masters(self) -> list[Master]:
        """The tensors that the torch optimizer moves, and what of which parameter lies in them on this rank."""
        ...

    def frozen(self) -> list[StateTensor]:
        """This rank's part of the parameters that do not train."""
        ...

    def gradients(self) -> list[Tensor]:
        """The averaged gradient that this rank's update will read, in pieces; writing to them changes the update."""
        ...

    def clear_gradients(self) -> None:
        """Clear what DeepSpeed leaves of a gradient after a step."""
        ...

    def refresh_model_params(self) -> None:
        """Bring masters that were just loaded to the parameters that forward reads. Collective."""
        ...
