"""Leaf regions: the cheap operations between two matrix products, which a compiler joins to one pass over memory.

A region is a function of tensors alone. Parameters come in as arguments from the `forward` of the module that owns
them, so an engine that shards parameters gathers them by its hooks outside of what is compiled, and no hook breaks a
graph. Whole layers are not compiled: hooks, checkpointing and attention's own kernels would break them apart anyway.
"""

from collections.abc import Callable
from itertools import count
from types import FunctionType
from typing import Any, TypeVar, cast

from tokscale.base.protocols import RegionCompiler, current

F = TypeVar("F", bound=Callable[..., Any])
_numbers = count()


def region(*, eager: Callable[..., Any] | None = None) -> Callable[[F], F]:
    """Make a function of tensors (by position) and options (by name) one that an engine may have compiled.

    Args:
        eager: The same function for the uncompiled case, where its own kernels beat PyTorch's single operations; the
            decorated function then is what a compiler reads.
    """

    def decorate(traced: F) -> F:
        plain = eager or traced

        def run(*tensors: Any, **options: Any) -> Any:
            compiled = current(RegionCompiler).compiled(traced, options)
            return plain(*tensors, **options) if compiled is None else compiled(*tensors)

        run.__name__, run.__doc__, run.__wrapped__ = traced.__name__, traced.__doc__, traced  # type: ignore[attr-defined]
        return cast(F, run)

    return decorate


def with_own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same function, which PyTorch compiles as often as it allows for one, whatever was compiled of its like.

    It counts by code object, and all closures of one place have the same.
    """
    assert isinstance(function, FunctionType)
    function.__code__ = function.__code__.replace(co_name=f"{name}_{next(_numbers)}")
    return function
