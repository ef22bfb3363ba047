"""What modules may ask of ZeRO: gathered weights for a while, and gradients that wait for the last of several uses."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokscale.base.protocols import ParameterAccess


@dataclass(frozen=True)
class ZeroAccess(ParameterAccess):
    """`ParameterAccess` where DeepSpeed shards the parameters (stage 3) or reduces gradients as they come (2, 3)."""

    deepspeed: Any
    """The module."""
    stage: int

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Whole weights inside the context, read-only. Collective."""
        if self.stage < 3:
            return nullcontext()
        return self.deepspeed.zero.GatheredParameters(list(parameters))

    @contextmanager
    def accumulating(self, parameters: Iterable[nn.Parameter], *, last: bool) -> Iterator[None]:
        """Only the `last` backward pass through shared parameters hands their gradient to the reduction.

        Without this, DeepSpeed reduces after every pass, and the second result overwrites the first or trips an
        assertion, depending on the size of the bucket.
        """
        shared: list[Any] = list(parameters)
        for parameter in shared:
            parameter.ds_grad_is_ready = last
        try:
            yield
        finally:
            for parameter in shared:
                parameter.ds_grad_is_ready = True

    @contextmanager
    def unsharded(self, engine: Any) -> Iterator[None]:
        """The whole model with DeepSpeed's hooks taken off, so that any of its methods may be called."""
        if self.stage < 3:
            yield
            return
        offload = engine.optimizer.parameter_offload
        with self.deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload._register_deepspeed_module(engine.module)
