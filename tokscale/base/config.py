"""Strict configuration: a plain mapping in, a frozen typed object out, or an error that names the key."""

import difflib
import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tokscale.base.address import SCHEMES, Address, address, is_address, slash_missing
from tokscale.base.errors import ConfigError, TokscaleError

_LARGEST = 2**63
"""Integers are below it in size: what tensors, files and random streams can hold."""
_LONGEST_NAME, _LONGEST_PATH = 255, 4096
"""Bytes of a file's name and of a path that Linux takes."""
_DEEPEST = 64
"""Levels of mappings and lists in a configuration; beyond it is an accident or an attack."""


def _path(value: Any) -> Any:
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        # 2026_11 has become 202611, and 1e3 1000.0: what folder was meant is not known any more.
        raise ValueError(f"got {_shown(value)}, which is no path; put the name in quotes")
    if is_address(value):
        raise ValueError(f"got {_shown(value)}; this key takes a path of this machine, no address")
    if not value.strip():
        raise ValueError("got an empty path; give one, or leave the key out ('.' is the current folder)")
    if strange := [sign for sign in value if unicodedata.category(sign) in ("Cc", "Cs")]:  # controls, no UTF-8
        raise ValueError(f"got {_shown(value)}; a path may not hold {strange[0]!r}")
    if value.startswith("~"):
        try:
            value = str(Path(value).expanduser())
        except RuntimeError:
            raise ValueError(f"got {value!r}; no such user; for a folder of that name write ./{value}") from None
    encoded = os.fsencode(value)
    if len(encoded) >= _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in encoded.split(b"/")):
        raise ValueError(
            f"got {_shown(value)}; a name has at most {_LONGEST_NAME} bytes, and a path fewer than {_LONGEST_PATH}"
        )
    return value


PathKey = Annotated[Path, BeforeValidator(_path)]
"""The type of every key that is a path: text that can be one, `~` expanded; numbers, empty text, control characters
and what is too long for a file system are refused by the key's name. Whether it is there is asked when it is used."""


def _place(value: Any) -> Path | Address:
    text = str(value)
    if isinstance(value, str | Path) and slash_missing(text):
        raise ValueError(f"got {_shown(text)}; an address begins with two slashes: {text.replace(':/', '://', 1)}")
    if not isinstance(value, str) or not is_address(value):
        return Path(_path(value))
    if (given := address(value)).scheme not in SCHEMES:
        raise ValueError(f"got {_shown(text)}; {given.scheme}:// is not read{did_you_mean(given.scheme, SCHEMES)}")
    return given


PlaceKey = Annotated[Path | str, PlainValidator(_place), PlainSerializer(str, when_used="json")]
"""The type of every key that is a path or an address: `Path` or `Address` in Python."""


MOST_LAYERS = 10_000
LayerCount = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
"""How many layers a network has. Each costs time when it is built, even without memory, so there is an end to them."""


def _inside(value: str) -> str:
    parts = value.split("/")
    if not value or any(part in ("", ".", "..") for part in parts) or any(ord(sign) < 32 for sign in value):
        raise ValueError(f"got {_shown(value)}; a stored name lies inside its folder: no '..', nothing absolute")
    return value


StoredName = Annotated[str, AfterValidator(_inside)]
"""The name of a file as a manifest or an index states it, relative to its own folder, which it does not leave."""


class Config(BaseModel):
    """Base of every configuration class: frozen, closed to unknown keys, documented under each field."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, values: Any) -> Any:
        # `engine.dtype=bf16` alone says nothing about the kind of engine, so it stays the default's.
        if not isinstance(values, dict):
            return values
        # To Python true is the number 1; whoever wrote it, or `on`, meant no number.
        values = values | {
            name: _as_words(values[name])
            for name, field in cls.model_fields.items()
            if name in values and _takes_numbers(annotation_of(field))
        }
        kinds = {
            name: field.default.kind
            for name, field in cls.model_fields.items()
            if isinstance(values.get(name), dict) and "kind" not in values[name] and hasattr(field.default, "kind")
        }
        return values | {name: {"kind": kind, **values[name]} for name, kind in kinds.items()}


def _takes_numbers(kind: Any) -> bool:
    """Whether a value may be a number, or a list of some, and never a truth value."""
    members = [
        m
        for member in members_of(kind)
        for m in (get_args(member) if get_origin(member) in (tuple, list) else [member])
    ]
    plain = {m for member in members for m in members_of(member)} - {NoneType, Ellipsis}
    return bool(plain) and plain <= {int, float}


def _as_words(value: Any) -> Any:
    """Truth values as text, which no number is."""
    if isinstance(value, list | tuple):
        return [_as_words(below) for below in value]
    return str(value).lower() if isinstance(value, bool) else value


T = TypeVar("T")
_MOST_PROBLEMS = 20
"""Lines of an error message."""
_LONGEST_SHOWN = 200
"""Characters of a value in one."""


def decode(kind: type[T] | Any, values: Any, *, where: str = "", refuse: type[TokscaleError] = ConfigError) -> T:
    """Decode plain values into a configuration, or into a record that a file holds.

    Args:
        kind: A `Config` class, or a union of them discriminated by `kind`.
        values: What YAML or JSON gave: dicts, lists, strings, numbers.
        where: Prefix for the path in error messages, e.g. `"model"`.
        refuse: Raised with one line per problem: the full path, the value, and the nearest legal name. Another one than
            `ConfigError` where the values are not the user's but a file's.
    """
    if problems := list(_not_plain(values, [where] if where else [])):
        raise refuse("\n".join(problems[:_MOST_PROBLEMS]))
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        typed = issubclass(refuse, ConfigError)
        lines = dict.fromkeys(_explain(kind, problem, where, typed) for problem in error.errors(include_url=False))
        more = [f"and {len(lines) - _MOST_PROBLEMS} problems more"] if len(lines) > _MOST_PROBLEMS else []
        raise refuse("\n".join([*list(lines)[:_MOST_PROBLEMS], *more])) from None


def _not_plain(values: Any, path: list[str | int]) -> Iterator[str]:
    """What no key can take, wherever it stands: also below keys whose type leaves their values open."""
    # Below an open key (`dict[str, Any]`) nobody else looks.
    if isinstance(values, Mapping | list | tuple):
        if len(path) > _DEEPEST:
            yield f"{_render([], path[:3])}: more than {_DEEPEST} levels deep"
            return
        pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
        for key, value in pairs:
            yield from _not_plain(value, [*path, key if isinstance(key, int) else str(key)])
    elif isinstance(values, float) and not math.isfinite(values):
        yield f"{_render([], path)}: got {values}; give a finite number"
    elif isinstance(values, int) and abs(values) >= _LARGEST:
        yield f"{_render([], path)}: got {_shown(values)}; an integer is below 2**63 in size"


def _shown(value: Any) -> str:
    """A value in an error message, which stays readable whatever was given."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _LARGEST:
        return f"an integer of {value.bit_length()} bits"  # its digits may be more than Python converts
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 20]}... ({len(text)} characters)"


def kind_of(config: Config | type[Config]) -> str:
    """The `kind` by which a configuration is asked for, where several may stand in one place."""
    known = type(config) if isinstance(config, Config) else config
    return str(known.model_fields["kind"].default) if "kind" in known.model_fields else ""


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
    near = [] if len(word) > _LONGEST_SHOWN else difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; choose from {', '.join(names)}" if names else ""


def _explain(kind: Any, problem: ErrorDetails, where: str, typed: bool) -> str:
    """One line on a problem; `typed`: a person gave the values, so what to give instead is said by its whole key."""
    # Pydantic puts the tag of a discriminated union, and type names of a plain one, into the location;
    # a reader's path has only keys and indices.
    location, fields, wanted = _walk(kind, problem["loc"])
    path = _render([where] if where else [], location)
    value, context = problem["input"], problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            return f"{path}: unknown key{did_you_mean(str(location[-1]), fields) or '; leave it out'}"
        case "missing":
            return f"{path}: required, but not given{_way_to_give(path, wanted) if typed else _DAMAGED}"
        case "literal_error" | "enum":
            choices = [part.strip("'") for part in context["expected"].replace(" or ", ", ").split(", ")]
            return f"{path}: got {_shown(value)}{did_you_mean(str(value), choices)}{_quote(value)}"
        case "string_type":
            return f"{path}: got {_shown(value)}; text is needed{_quote(value)}"
        case "union_tag_invalid":
            choices = [part.strip(" '") for part in context["expected_tags"].split(",")]
            return f"{path}.kind: got {context['tag']!r}{did_you_mean(str(context['tag']), choices)}"
        case "kind_required" | "union_tag_not_found":
            return f"{path}.kind: required, but not given{_way_to_give(path, wanted) if typed else _DAMAGED}"
        case "unknown_kind":
            return f"{path}.kind: {context['text']}"
        case "value_error":
            text = str(context["error"])
            if typed and path:  # a class does not know where it stands, so its messages name keys of its own
                above = path if wanted is None or set(_fields(wanted)) == set(fields) else path.rpartition(".")[0]
                text = _with_whole_keys(text, above, fields)
            return f"{path}: {text}" if path else text
        case _:
            return f"{path}: got {_shown(value)}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


_DAMAGED = "; it was damaged or edited"
_FORMS = {Path: "PATH", str: "TEXT", int: "NUMBER", float: "NUMBER", bool: "true"}


def _way_to_give(path: str, wanted: Any) -> str:
    """How what is missing can be given, by its type."""
    if path.endswith("]") or "]" in path:  # of an entry of a list, which is written as a whole
        return f"; write the key {path.rpartition('.')[2]!r} into that entry of the list"
    members = [member for member in members_of(wanted) if member is not NoneType]
    if kinds := sorted(tag for member in members if (tag := _tag(member))):
        return f"; give {path}.kind=KIND, one of {', '.join(kinds)}"
    if choices := [str(choice) for member in members if get_origin(member) is Literal for choice in get_args(member)]:
        return f"; give {path}=WORD, one of {', '.join(choices)}"
    if any(get_origin(member) in (list, tuple) for member in members):
        return f"; give '{path}=[...]'"
    return f"; give {path}={next((_FORMS[member] for member in members if member in _FORMS), 'VALUE')}"


def _with_whole_keys(text: str, above: str, fields: Iterable[str]) -> str:
    """The same message, the `key=value` of its advice as they are typed: with what they stand below."""
    what, colon, advice = text.partition(";")
    names = "|".join(sorted(map(re.escape, fields), key=len, reverse=True))
    if not above or not names or "]" in above:
        return text
    return what + colon + re.sub(rf"(?<![\w.-])({names})=(?=[^\s=])", rf"{above}.\1=", advice)


def _quote(value: Any) -> str:
    """Advice where a word was written that is none in YAML."""
    if isinstance(value, bool):
        return "; yes, no, on, off, true and false are no words unless in quotes"
    return "; put it in quotes" if isinstance(value, int | float) else ""


def _render(prefix: list[str], location: list[str | int]) -> str:
    text = ".".join(prefix)
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _walk(kind: Any, loc: tuple[str | int, ...]) -> tuple[list[str | int], list[str], Any]:
    """Drop union tags from a pydantic location; also return the field names at its last level, and the type there."""
    path: list[str | int] = []
    fields: list[str] = list(_fields(kind))
    current: Any = kind
    for part in loc:
        known = _fields(current)
        members = members_of(current)
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
    return path, fields, current


def members_of(kind: Any) -> list[Any]:
    """The alternatives of a (possibly annotated or optional) union, or the type itself."""
    if get_origin(kind) is Annotated:
        inner, *marks = get_args(kind)
        # An annotation may stand for several types, which are not known yet when the class around it is made.
        several = [mark.members() for mark in marks if hasattr(mark, "members")]
        return list(several[0]) if several else members_of(inner)
    if get_origin(kind) in (Union, UnionType):
        return [member for argument in get_args(kind) for member in members_of(argument)]
    return [kind]


def annotation_of(field: FieldInfo) -> Any:
    """A field's type as it was written: pydantic keeps what `Annotated` adds to it elsewhere."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _fields(kind: Any) -> dict[str, Any]:
    found = {}
    members = members_of(kind)
    for member in members:
        if isinstance(member, type) and issubclass(member, BaseModel):
            # Keys of another alternative are not suggestions for this one.
            if len([m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]) > 1:
                return {}
            found |= {name: annotation_of(field) for name, field in member.model_fields.items()}
    return found


def _tag(member: Any) -> str | None:
    field = getattr(member, "model_fields", {}).get("kind")
    return field.default if field is not None and isinstance(field.default, str) else None


def _name(member: Any) -> str:
    return getattr(member, "__name__", "")


def _item(kind: Any) -> Any:
    for member in members_of(kind):
        if arguments := getattr(member, "__args__", ()):
            return arguments[0]
    return None


def _mapping(kind: Any) -> Any:
    for member in members_of(kind):
        origin = getattr(member, "__origin__", None)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return member.__args__[1]
    return None
