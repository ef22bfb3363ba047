"""A configuration class as help for a person: every key with its type, default and meaning."""

import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tokscale.base.config import annotation_of, members_of

_WIDTH = 110


def outline(config: type[BaseModel], width: int = 118) -> str:
    """The keys of a configuration class by themselves, a line each: type, default and the first sentence on them."""
    lines = []
    for name, field in config.model_fields.items():
        parts = [member for member in members_of(annotation_of(field)) if _is_config(member)]
        kinds = " | ".join(dict.fromkeys(_kind(part) for part in parts if _kind(part)))
        what = f"{kinds or 'keys'}, see --help {name}" if parts else _type(annotation_of(field))
        text = " ".join((field.description or "").split())
        sentence = re.split(r"(?<=[^.])[.:;] ", f"{text} ")[0].rstrip(". ")
        lines.append(textwrap.shorten(f"  {name}: {what}{_default(field)}  # {sentence}", width, placeholder=" ..."))
    return "\n".join(f"  {line}" for line in lines)


def classes_below(config: type[BaseModel], path: Sequence[str]) -> list[type[BaseModel]]:
    """The configuration classes that a dotted key may hold, of a union all; a kind may be a part of the path."""
    found = [config]
    for part in path:
        below = [kind for kind in found if _kind(kind) == part]
        for kind in [] if below else found:
            field = kind.model_fields.get(part)
            below += [member for member in members_of(annotation_of(field)) if _is_config(member)] if field else []
        found = list(dict.fromkeys(below))
    return found


def heading(config: type[BaseModel]) -> str:
    """`kind=dalle: the first line of what it is`."""
    return f"kind={_kind(config)}: {_first_line(config)}" if _kind(config) else _first_line(config)


def describe(config: type[BaseModel], indent: int = 2) -> str:
    """All keys of a configuration class, nested ones indented, the alternatives of a union one after the other."""
    return "\n".join(_lines(config, indent, ()))


def describe_key(config: type[BaseModel], name: str, indent: int = 2) -> str:
    """One key of a configuration class, and what is below it."""
    return "\n".join(_lines(config, indent, (), (name,)))


def _lines(
    config: type[BaseModel], indent: int, above: tuple[type, ...], names: Sequence[str] | None = None
) -> Iterator[str]:
    for name, field in config.model_fields.items():
        if names is not None and name not in names:
            continue
        if name == "kind" and len(get_args(field.annotation)) == 1:
            continue  # said above, where the alternatives are
        parts = [
            member
            for member in members_of(annotation_of(field))
            if _is_config(member) and member not in (*above, config)
        ]
        yield f"{' ' * indent}{name}: {_type(annotation_of(field))}{_default(field)}"
        if field.description:
            text = " ".join(field.description.split())
            yield textwrap.fill(text, _WIDTH, initial_indent=" " * (indent + 4), subsequent_indent=" " * (indent + 4))
        for part in parts:
            if len(parts) > 1:
                yield f"{' ' * (indent + 4)}with kind={_kind(part)}: {_first_line(part)}"
            yield from _lines(part, indent + (6 if len(parts) > 1 else 4), (*above, config))


def _type(kind: Any) -> str:
    members = [_name(member) for member in members_of(kind)]
    return " | ".join(dict.fromkeys(members))


def _name(member: Any) -> str:
    if member in (NoneType, None):
        return "null"
    if get_origin(member) is Literal:
        return " | ".join(str(choice) for choice in get_args(member))
    if get_origin(member) is not None:
        inner = ", ".join("..." if argument is ... else _type(argument) for argument in get_args(member))
        return f"{_name(get_origin(member))}[{inner}]"
    if isinstance(member, type) and issubclass(member, Enum):
        return " | ".join(str(choice.value) for choice in member)
    if _is_config(member):
        return f"{_kind(member)} (keys below)" if _kind(member) else "keys below"
    if member is Any:
        return "any"
    return {Path: "path", str: "text", float: "number", int: "integer", bool: "true | false", tuple: "list"}.get(
        member, getattr(member, "__name__", str(member))
    )


def _is_config(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, BaseModel)


def _kind(config: type[BaseModel]) -> str:
    field = config.model_fields.get("kind")
    return field.default if field is not None and isinstance(field.default, str) else ""


def _first_line(config: type[BaseModel]) -> str:
    return (inspect.getdoc(config) or "").split("\n")[0]


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return ", required"
    if default is None or default == "" or isinstance(default, BaseModel):
        return ""
    if isinstance(default, bool):
        return f" = {str(default).lower()}"
    if isinstance(default, (tuple, list)):
        return f" = [{', '.join(str(item) for item in default)}]"
    return f" = {default}"
