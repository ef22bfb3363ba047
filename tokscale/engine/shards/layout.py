"""The questions that a ZeRO layout answers."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from tokscale.engine.fragments import Fragment, Held


class Layout(Protocol):
    """How one ZeRO stage stores masters, moments and gradients. Everything here is private to DeepSpeed."""

    optimizer: torch.optim.Optimizer
    """The torch optimizer that moves the masters."""
    replicated: bool
    """True when fragments are whole parameters on every rank."""

    def masters(self) -> list[tuple[Tensor, dict[str, object]]]:
        """The tensors that the torch optimizer moves, each with the `param_groups` entry it belongs to."""
        ...

    def fragments(self, names: Mapping[nn.Parameter, str]) -> list[Fragment]:
        """This rank's part of every trainable parameter."""
        ...

    def frozen(self) -> list[Held]:
        """This rank's part of the parameters that do not train."""
        ...

    def gradients(self) -> list[Tensor]:
        """The averaged gradient that this rank's update will read, in pieces; writing to them changes the update."""
        ...

    def rule(self, discard: bool) -> None:
        """Decide whether DeepSpeed's next step applies the gradient or clears it."""
        ...

    def forget(self) -> None:
        """Clear what DeepSpeed leaves of a gradient after a step."""
        ...

    def publish(self) -> None:
        """Bring masters that were just loaded to the parameters that forward reads. Collective."""
        ...
