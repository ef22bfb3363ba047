"""Strict configuration: a plain mapping in, a frozen typed object out, or an error that names the key."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails

from tokscale.base.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration class: frozen, closed to unknown keys, documented under each field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_default_kinds(cls, values: Any) -> Any:
        # `engine.dtype=bf16` alone says nothing about the kind of engine, so it stays the default's.
        if not isinstance(values, dict):
            return values
        kinds = {
            name: field.default.kind
            for name, field in cls.model_fields.items()
            if isinstance(values.get(name), dict) and "kind" not in values[name] and hasattr(field.default, "kind")
        }
        return values | {name: {"kind": kind, **values[name]} for name, kind in kinds.items()}


T = TypeVar("T")


def decode(kind: type[T] | Any, values: Any, *, where: str = "") -> T:
    """Decode plain values into a configuration.

    Args:
        kind: A `Config` class, or a union of them discriminated by `kind`.
        values: What YAML or JSON gave: dicts, lists, strings, numbers.
        where: Prefix for the path in error messages, e.g. `"model"`.

    Raises:
        ConfigError: With one line per problem: the full path, the value, and the nearest legal name.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        lines = [_explain(kind, problem, where) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def encode(config: Config) -> dict[str, Any]:
    """The plain, JSON-ready mapping that `decode` reads back."""
    return config.model_dump(mode="json")


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON of a config or a plain value; stable between runs and machines."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or the list of choices when nothing is near."""
    names = sorted(str(choice) for choice in choices)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; choose from {', '.join(names)}" if names else ""


def _explain(kind: Any, problem: ErrorDetails, where: str) -> str:
    # Pydantic puts the tag of a discriminated union, and type names of a plain one, into the location;
    # a reader's path has only keys and indices.
    location, fields = _walk(kind, problem["loc"])
    path = _render([where] if where else [], location)
    value, context = problem["input"], problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            return f"{path}: unknown key{did_you_mean(str(location[-1]), fields)}"
        case "missing":
            return f"{path}: required, but not given"
        case "literal_error" | "enum":
            choices = [part.strip("'") for part in context["expected"].replace(" or ", ", ").split(", ")]
            return f"{path}: got {value!r}{did_you_mean(str(value), choices)}"
        case "union_tag_invalid":
            choices = [part.strip(" '") for part in context["expected_tags"].split(",")]
            return f"{path}.kind: got {context['tag']!r}{did_you_mean(str(context['tag']), choices)}"
        case "union_tag_not_found":
            return f"{path}.kind: required, but not given"
        case "value_error":
            return f"{path}: {context['error']}" if path else str(context["error"])
        case _:
            return f"{path}: got {value!r}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _render(prefix: list[str], location: list[str | int]) -> str:
    text = ".".join(prefix)
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _walk(kind: Any, loc: tuple[str | int, ...]) -> tuple[list[str | int], list[str]]:
    """Drop union tags from a pydantic location; also return the field names at its last level."""
    path: list[str | int] = []
    fields: list[str] = list(_fields(kind))
    current: Any = kind
    for part in loc:
        known = _fields(current)
        members = _members(current)
        if isinstance(part, str) and part in known:
            path.append(part)
            current = known[part]
        elif isinstance(part, str) and (tagged := [m for m in members if _tag(m) == part or _name(m) == part]):
            current = tagged[0]
        elif isinstance(part, int) or known:
            path.append(part)
            if isinstance(part, int):
                current = _item(current)
        elif _mapping(current) is not None:
            path.append(part)
            current = _mapping(current)
        # anything else is a name pydantic made up for a member of a plain union
        fields = list(_fields(current)) or fields
    return path, fields


def _members(kind: Any) -> list[Any]:
    """The alternatives of a (possibly annotated or optional) union, or the type itself."""
    if metadata := getattr(kind, "__metadata__", None):
        del metadata
        return _members(kind.__origin__)
    arguments = getattr(kind, "__args__", ())
    is_union = type(kind).__name__ in ("UnionType", "_UnionGenericAlias", "Union")
    return [m for a in arguments for m in _members(a)] if is_union else [kind]


def _fields(kind: Any) -> dict[str, Any]:
    found = {}
    members = _members(kind)
    for member in members:
        if isinstance(member, type) and issubclass(member, BaseModel):
            # Keys of another alternative are not suggestions for this one.
            if len([m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]) > 1:
                return {}
            found |= {name: field.annotation for name, field in member.model_fields.items()}
    return found


def _tag(member: Any) -> str | None:
    field = getattr(member, "model_fields", {}).get("kind")
    return field.default if field is not None and isinstance(field.default, str) else None


def _name(member: Any) -> str:
    return getattr(member, "__name__", "")


def _item(kind: Any) -> Any:
    for member in _members(kind):
        if arguments := getattr(member, "__args__", ()):
            return arguments[0]
    return None


def _mapping(kind: Any) -> Any:
    for member in _members(kind):
        origin = getattr(member, "__origin__", None)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return member.__args__[1]
    return None
