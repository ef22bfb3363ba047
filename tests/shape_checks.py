"""The type checker that tests run the library under: beartype, for shapes alone.

Pyright checks all other types; at run time they would only forbid stand-ins and an int where a float is meant.
"""

from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the tensors among its arguments and results checked on every call."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if _names_a_shape(hint)}
    return beartype(function)


def _names_a_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_names_a_shape(argument) for argument in get_args(hint))
