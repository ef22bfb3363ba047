"""Building networks whose sizes a stranger's file states."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from tokscale.base.errors import TokscaleError


@contextmanager
def trial_build(where: str, tensors: int, refuse: type[TokscaleError]) -> Iterator[None]:
    """Inside, a network is built without memory, and only as large as its stored weights allow.

    A configuration may state any size. On the meta device widths cost nothing, but layers do: their number is held to
    that of the stored tensors.

    Args:
        where: The file that states the sizes, for errors.
        tensors: How many are stored.
        refuse: Raised when the configuration fits no network, or one of far more parts than there are weights.
    """
    left = {"parameters": 4 * tensors + 1000, "modules": 40 * tensors + 10_000}
    thread = threading.get_ident()

    def count(kind: str) -> None:
        if threading.get_ident() == thread:
            left[kind] -= 1
            if left[kind] < 0:
                raise refuse(f"{where}: states a network of far more {kind} than the {tensors} weights that are stored")

    def on_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        count("parameters")

    def on_module(module: nn.Module, name: str, child: nn.Module) -> None:
        count("modules")

    handles = (
        register_module_parameter_registration_hook(on_parameter),
        register_module_module_registration_hook(on_module),
    )
    try:
        with torch.device("meta"):
            yield
    except TokscaleError as error:
        raise error if isinstance(error, refuse) else refuse(f"{where}: {error}") from None
    except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError, RecursionError, AssertionError) as error:
        raise refuse(f"{where}: states sizes of which no network can be built ({str(error)[:300]})") from error
    finally:
        for handle in handles:
            handle.remove()
