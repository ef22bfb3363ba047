"""One word of the command line to a key and its value, by what the key is for.

Keys of text and of paths take what was typed as it stands: `2026_11` is a folder, not the number 202611, and a caption
may hold commas, colons and `$`. Every other key takes Hydra's grammar: numbers, `true`, `null`, `[a, b]`, `{a: 1}`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, assert_never, get_args, get_origin

from pydantic import BaseModel

from tokscale.base.config import annotation_of, members_of
from tokscale.base.errors import ConfigError

Form = Literal["text", "text or null", "texts", "other"]
PROMPTS = frozenset({"prompts", "negative_prompt"})
"""Keys, at any depth, whose text is a caption: nothing in it is a reference, and `???` is three question marks."""
_LONGEST, _LONGEST_HYDRA = 1 << 20, 1 << 14
"""Characters of one word, and of one in Hydra's grammar, whose reader is slow."""
_UNDERSCORES, _QUOTED = re.compile(r"(?<![\w./-])\d+(?:_\d+)+(?![\w./-])"), re.compile(r""""[^"]*"|'[^']*'""")
"""Digits with underscores between them, which are numbers to Hydra; and what is text in any case."""
_ITEM = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,"'\s][^,]*)\s*(,|$)""", re.DOTALL)


def split(word: str) -> tuple[str, str]:
    """The key and what was typed for it.

    Raises:
        ConfigError: When it is not of the form key=value.
    """
    key, equals, text = word.partition("=")
    if not equals or not re.fullmatch(r"\+{0,2}[\w-]+(\.[\w-]+)*", key):
        raise ConfigError(f"{word[:200]!r}: not of the form key=value")
    if len(text) > _LONGEST:
        raise ConfigError(f"{key}: {len(text)} characters; at most {_LONGEST} are read from the command line")
    return key.lstrip("+"), text


def parse(key: str, text: str, form: Form = "other") -> Any:
    """The value of a key.

    Raises:
        ConfigError: When it is not written as such keys are.
    """
    match form:
        case "text":
            return unquoted(text)
        case "text or null":
            return None if text == "null" else unquoted(text)
        case "texts":
            return _texts(key, text) if text.startswith("[") else [unquoted(text)]
        case "other" if key.rpartition(".")[2] in PROMPTS and not text.startswith("{"):
            return _texts(key, text) if text.startswith("[") else unquoted(text)
        case "other":
            return _hydra(key, text)
        case _:
            assert_never(form)


def form_of(config: Any, key: str) -> Form:
    """How the value of a key is written, by the types of a configuration class."""
    kinds = [config]
    for part in key.split("."):
        kinds = [below for kind in kinds for below in _below(kind, part)]
    plain = {member for kind in kinds for member in members_of(kind)}
    if plain and plain <= {str, Path, NoneType}:
        return "text or null" if NoneType in plain else "text"
    if plain and all(_lists_text(member) for member in plain):
        return "texts"
    return "other"


def _below(kind: Any, part: str) -> list[Any]:
    """The types of a key in each alternative of a type."""
    found = []
    for member in members_of(kind):
        if isinstance(member, type) and issubclass(member, BaseModel) and part in member.model_fields:
            found.append(annotation_of(member.model_fields[part]))
        elif isinstance(get_origin(member), type) and issubclass(get_origin(member), Mapping):  # pyright: ignore[reportArgumentType]
            found.append(get_args(member)[1])
    return found


def _lists_text(kind: Any) -> bool:
    items = [item for item in get_args(kind) if item is not ...]
    return get_origin(kind) in (tuple, list) and {m for item in items for m in members_of(item)} <= {str, Path}


def unquoted(text: str) -> str:
    """Text without the quotes around it, if it stands in any."""
    if found := re.fullmatch(r"""(["'])((?:(?!\1)[^\\]|\\.)*)\1""", text, re.DOTALL):
        return re.sub(r"""\\(["'\\])""", r"\1", found[2])
    return text


def _texts(key: str, text: str) -> list[str]:
    """A list of texts: each in quotes, or as it is up to the next comma."""
    advice = f"""write '{key}=["...", "..."]'"""
    if not text.endswith("]"):
        raise ConfigError(f"{key}: got {text[:200]!r}; a list ends with ']'; {advice}")
    inside, at, found = text[1:-1].rstrip(), 0, []
    while at < len(inside):
        item = _ITEM.match(inside, at)
        if item is None:
            raise ConfigError(f"{key}: cannot read the list at {inside[at : at + 100]!r}; {advice}")
        found.append(unquoted(item[1].rstrip()))
        at = item.end()
        if item[2] and at == len(inside):
            raise ConfigError(f"{key}: nothing follows the last comma in {text[-100:]!r}; {advice}")
    return found


def _hydra(key: str, text: str) -> Any:
    if len(text) > _LONGEST_HYDRA:
        raise ConfigError(f"{key}: {len(text)} characters; at most {_LONGEST_HYDRA} are read from the command line")
    # Half a second, which help and keys of text need not wait for.
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
        swept = override.is_sweep_override()
        value = None if swept else override.value()
    except (HydraException, ValueError, RecursionError) as error:
        if text[:1] not in ("[", "{", '"', "'"):
            return text  # what the key is for decides, and says what it takes
        reason = "too deep" if isinstance(error, RecursionError) else str(error).split("\n")[0][:200]
        raise ConfigError(f'{key}: cannot read {text[:200]!r} ({reason}); put text in it in quotes: "..."') from None
    for found in _UNDERSCORES.findall(_QUOTED.sub("", text)):
        if not re.fullmatch(r"\d{1,3}(_\d{3})+", found):
            number = found.replace("_", "")
            raise ConfigError(f'{key}: got {found}; write the number {number}, or put text in quotes: "{found}"')
    if swept:
        raise ConfigError(f"{key}: got {text[:200]!r}, several values; a list is written '{key}=[a,b]'")
    return value
