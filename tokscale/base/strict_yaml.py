"""YAML that anyone may have written: read whole, within bounds, or refused by place and reason.

A file can be made so that reading it takes all memory or all of the stack: by depth, by aliases that repeat aliases, by
numbers of a million digits. So what is read is bounded before a reader builds anything from it.
"""

import os
import re
import stat
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tokscale.base.errors import ConfigError, TokscaleError

_LARGEST_YAML = 1 << 18
"""Bytes; a recipe has a few thousand."""
_DEEPEST = 64
"""Levels of mappings and lists."""
_MOST_NODES = 100_000
"""Values in a YAML file after its aliases are expanded."""
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(_\d{3})+(\.\d*)?")
_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+")
"""What is a number everywhere but in YAML 1.1, which wants a point and a sign in it: 1e-3."""
_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _MisplacedError(Exception):
    """What is wrong, and at which mark of the file."""

    def __init__(self, mark: yaml.Mark | None, reason: str):
        super().__init__(reason)
        self.mark = mark


class _Strict(yaml.SafeLoader):
    """Plain values only; a key stands once, a date stays the text it is."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    yaml_constructors = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.style is None:
            if surprise := _surprise(node):
                raise _MisplacedError(node.start_mark, surprise)
            if node.tag.endswith(":str") and _FLOAT.fullmatch(node.value):
                return float(node.value)
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, RecursionError):  # of int() and float(): too many digits, or none
            raise _MisplacedError(node.start_mark, "not readable as a number; text goes in quotes") from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        known: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in known:
                    raise _MisplacedError(key.start_mark, f"the key {key.value[:100]!r} stands there twice")
                known.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _surprise(node: yaml.ScalarNode) -> str | None:
    """What YAML 1.1 takes for another number than who wrote it; None where there is no doubt."""
    text = node.value
    if node.tag.rpartition(":")[2] not in ("int", "float"):
        return None
    if ":" in text:
        return f"{text} is a number to the base of 60 in YAML; put it in quotes, as text"
    if re.fullmatch(r"[-+]?0[0-7_]+", text):
        return (
            f"{text} is a number to the base of 8 in YAML; leave out the zero before it, or put it in quotes, as text"
        )
    if "_" in text and not text.startswith(("0x", "0b")) and not _THOUSANDS.fullmatch(text):
        plain = text.replace("_", "")
        return f"{text} is the number {plain} in YAML; write that, or put it in quotes, as text"
    return None


def read_yaml(path: Path | str, *, refuse: type[TokscaleError] = ConfigError) -> dict[str, Any]:
    """The mapping in a YAML file; empty for an empty file.

    Args:
        path: Of a regular file in UTF-8, with or without a byte order mark.
        refuse: Raised with `path:line:column: reason` when the file cannot be read, is no YAML, holds anything but
            plain values, a key twice or no mapping, or is larger or deeper than any configuration.
    """
    path = Path(path)
    text = _text(path, refuse)
    try:
        _bound(text)
        values = yaml.load(text, Loader=_Strict)
    except _MisplacedError as error:
        raise refuse(f"{path}{_place(error.mark)}: {error}") from None
    except yaml.MarkedYAMLError as error:
        raise refuse(f"{path}{_place(error.problem_mark)}: {_reason(error, text)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise refuse(f"{path}:{line}: the character {chr(_ordinal(error))!r} may not stand in YAML") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise refuse(f"{path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise refuse(f"{path}:1: holds a {type(values).__name__}; a mapping of keys to values is needed")
    for key in values:
        if not isinstance(key, str):
            raise refuse(f"{path}: the key {key!r} is no text; put it in quotes")
    return values


def _text(path: Path, refuse: type[TokscaleError]) -> str:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise refuse(f"{path}: is no regular file")
        if found.st_size > _LARGEST_YAML:
            raise refuse(f"{path}: has {found.st_size} bytes; at most {_LARGEST_YAML} are read")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise refuse(f"{path}: {reason}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise refuse(f"{path}:{line}: byte {data[error.start]:#x} is no UTF-8; save the file as UTF-8") from None


def _bound(text: str) -> None:
    """Go over the events of a file, of which the parser builds nothing, and count what a reader would build."""
    total, sizes = 0, {}
    open_nodes: list[list[Any]] = []  # [anchor, values in it]
    for event in _events(text):
        count = 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, 1])
            if len(open_nodes) > _DEEPEST:
                raise _MisplacedError(event.start_mark, f"more than {_DEEPEST} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, inside = open_nodes.pop()
            sizes[anchor] = inside
            if open_nodes:
                open_nodes[-1][1] += inside
        elif isinstance(event, yaml.ScalarEvent):
            count = sizes[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _MisplacedError(event.start_mark, f"*{event.anchor} stands inside or before &{event.anchor}")
            count = sizes[event.anchor]
        if count and open_nodes:
            open_nodes[-1][1] += count
        total += count
        if total > _MOST_NODES:
            raise _MisplacedError(event.start_mark, f"more than {_MOST_NODES} values, its aliases expanded")


def _events(text: str) -> Iterator[yaml.Event]:
    return iter(yaml.parse(text, Loader=_PARSER))


def _place(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f":{mark.line + 1}:{mark.column + 1}"


def _reason(error: yaml.MarkedYAMLError, text: str) -> str:
    problem, mark = error.problem or error.context or "no YAML", error.problem_mark
    if mark is not None and text[mark.index : mark.index + 1] == "\t":
        return "a tab; indent with spaces"
    if found := re.search(r"constructor for the tag '(.*)'", problem):
        return f"the tag {found[1][:100]!r} is unknown; only plain values are read"
    return f"{error.context}: {problem}" if error.context and error.context not in problem else problem


def _ordinal(error: yaml.reader.ReaderError) -> int:
    return error.character if isinstance(error.character, int) else ord(error.character)
