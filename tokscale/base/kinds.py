"""Where kinds are told apart: what a new kind has to bring is asked for at import, never taken from the last one."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin

from tokscale.base.config import members_of

V = TypeVar("V")


def for_each(kinds: Any, table: Mapping[Any, V]) -> Mapping[Any, V]:
    """`table`, which has an entry for every kind.

    Args:
        kinds: A `Literal`, or a union of classes.
        table: By the value of the literal, or by the class.

    Raises:
        TypeError: When a kind has no entry, or an entry is for none: a defect of the module that is being imported.
    """
    known = set()
    for member in members_of(kinds):
        known |= set(get_args(member)) if get_origin(member) is Literal else {member}
    if set(table) != known:
        missing, unknown = known - set(table), set(table) - known
        raise TypeError(f"a table of kinds lacks {_names(missing)} and has {_names(unknown)} too many")
    return MappingProxyType(dict(table))


def require_own(kind: type, base: type, parts: Iterable[str]) -> None:
    """Refuse a class that leaves a part as its base has it. For `__init_subclass__`.

    Raises:
        TypeError: Naming the parts.
    """
    missing = [part for part in parts if getattr(kind, part, None) is getattr(base, part, None)]
    if missing:
        raise TypeError(f"{kind.__name__} lacks {', '.join(missing)}, which every {base.__name__} says for itself")


def _names(kinds: set[Any]) -> str:
    return ", ".join(sorted(getattr(kind, "__name__", repr(kind)) for kind in kinds)) or "nothing"
