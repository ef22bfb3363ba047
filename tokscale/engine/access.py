"""What modules may ask of ZeRO: gathered weights for a while, and gradients that wait for the last of several uses."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from tokscale.base.protocols import ParameterAccess


@dataclass(frozen=True)
class ZeroAccess(ParameterAccess):
    """`ParameterAccess` where DeepSpeed shards the parameters (stage 3) or reduces gradients as they come (2, 3)."""

    deepspeed: Any
    """The module."""
    stage: int

    @property
    def whole(self) -> bool:
        """Below stage 3."""
        return self.stage < 3

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Whole weights inside the context, read-only. Collective."""
        if self.whole:
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
        if self.whole:
            yield
            return
        with self.gathered(engine.module.parameters()), _unhooked(engine):
            yield

    @contextmanager
    def by_module(self, engine: Any) -> Iterator[None]:
        """Each module's own parameters whole while it is called, whatever is called when, and the others not.

        DeepSpeed's hooks do so, too, but learn the order of the calls, and keep a parameter that a method reads outside
        its module whole from then on.
        """
        if self.whole:
            yield
            return
        with _unhooked(engine), ExitStack() as hooks:
            for module in engine.module.modules():
                if own := list(module.parameters(recurse=False)):
                    for hook in self._around_calls(module, own):
                        hooks.callback(hook.remove)
            yield

    def _around_calls(self, module: nn.Module, own: list[nn.Parameter]) -> Iterator[RemovableHandle]:
        calls = ExitStack()

        def enter(*_: Any) -> None:
            calls.enter_context(self.gathered(own))

        def leave(*_: Any) -> None:
            calls.close()

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave, always_call=True)


@contextmanager
def _unhooked(engine: Any) -> Iterator[None]:
    """Modules without DeepSpeed's hooks; it learns the order of its calls anew afterwards."""
    offload = engine.optimizer.parameter_offload
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        yield
    finally:
        offload._register_deepspeed_module(engine.module)
