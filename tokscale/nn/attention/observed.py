"""Attention that can be looked into while a model computes: what diagnostics ask of every attention."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from tokscale.base.shapes import Float, Tensor

Look = Callable[[str, Float[Tensor, "heads queries keys"]], None]
"""Is given the name of an attention, and the weights of one sample."""


class ObservedAttention(nn.Module, ABC):
    """A module whose attention over whole sequences is computed by one method, and in a slow way by another."""

    named_as_owner: ClassVar[bool] = False
    """Whether it is a part of what people call the attention, and goes by the name of that."""

    @abstractmethod
    def attend(self, *given: Any, **how: Any) -> Float[Tensor, "batch heads queries dim_head"]:
        """Attention proper; its first argument has a row for each sample."""

    @abstractmethod
    def weights(self, *given: Any, **how: Any) -> Float[Tensor, "heads queries keys"]:
        """How much each query of one sample takes of each key, in single precision.

        Args:
            given: The number of the sample, then what `attend` is given.
            how: As `attend`.
        """


def observed(model: nn.Module) -> dict[str, ObservedAttention]:
    """Every attention of a model that can be looked into, by its name for people."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, ObservedAttention)}
    return {name.rpartition(".")[0] if module.named_as_owner else name: module for name, module in found.items()}


@contextmanager
def looking(attentions: Mapping[str, ObservedAttention], look: Look) -> Iterator[None]:
    """Inside, each attention also shows its weights, sample by sample, and computes what it always does."""

    def watch(name: str, module: ObservedAttention) -> None:
        plain = module.attend

        def attend(*given: Any, **how: Any) -> Tensor:
            with torch.no_grad(), torch.autocast(given[0].device.type, enabled=False):
                for sample in range(len(given[0])):
                    look(name, module.weights(sample, *given, **how))
            return plain(*given, **how)

        vars(module)["attend"] = attend  # of this object alone; it hides the method

    for name, module in attentions.items():
        watch(name, module)
    try:
        yield
    finally:
        for module in attentions.values():
            del vars(module)["attend"]
