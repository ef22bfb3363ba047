"""`${references}` between the values of a configuration."""

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokscale.base.errors import ConfigError
from tokscale.cli.values import PROMPTS

_DEEPEST = 64
"""Levels of mappings and lists."""
_LARGEST = 1 << 20
"""Values and characters of a configuration with its references filled in."""
_REFERENCE = re.compile(r"\$\{\s*([\w.\[\]-]+|oc\.env:[^${}]+)\s*\}")
_KNOWN = "${key.below}, or ${oc.env:NAME} for a variable of the environment"
_Path = tuple[str | int, ...]


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in `${references}` and refuse what is still `???`. Captions are taken as they stand.

    Raises:
        ConfigError: When a reference leads nowhere or in a circle, or what it leads to grows without bound.
    """
    captions: dict[_Path, Any] = {}
    plain = _without_captions(values, (), captions)
    _Sizes(plain).of(())
    try:
        tree = OmegaConf.create(plain)
        resolved: Any = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).split("\n")[0][:500] or type(error).__name__
        key = getattr(error, "full_key", None)
        raise ConfigError(reason if not key or key in reason else f"{key}: {reason}") from None
    except (RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"the configuration cannot be put together: {str(error)[:500]}") from None
    for path, value in captions.items():
        below: Any = resolved
        for part in path[:-1]:
            below = below[part]
        below[path[-1]] = value
    return resolved


def _without_captions(values: Any, path: _Path, captions: dict[_Path, Any]) -> Any:
    """The same values, captions put aside; refuses what is deeper than any configuration."""
    if not isinstance(values, Mapping | list | tuple):
        return values
    if len(path) > _DEEPEST:
        raise ConfigError(f"{'.'.join(map(str, path[:3]))}: more than {_DEEPEST} levels deep")
    if not isinstance(values, Mapping):
        return [_without_captions(value, (*path, at), captions) for at, value in enumerate(values)]
    kept = {}
    for key, value in values.items():
        if key in PROMPTS:
            captions[*path, key] = value
            value = None
        kept[key] = _without_captions(value, (*path, key), captions)
    return kept


class _Sizes:
    """How much each value is with its references filled in, worked out without filling them in."""

    def __init__(self, root: dict[str, Any]):
        self._root = root
        self._known: dict[_Path, int] = {}

    def of(self, path: _Path) -> int:
        """Values and characters of what lies at a path; 0 for what is not there."""
        if path in self._known:
            if self._known[path] < 0:
                raise ConfigError(f"{'.'.join(map(str, path))}: its reference leads back to itself")
            return self._known[path]
        value: Any = self._root
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return 0
        self._known[path] = -1
        size = 1
        if isinstance(value, str):
            size += len(value)
            if value.count("${") > len(found := _REFERENCE.findall(value)):
                raise ConfigError(f"{'.'.join(map(str, path))}: got {value[:200]!r}; references: {_KNOWN}")
            size += sum(self.of(self._target(path, name)) for name in found if ":" not in name)
        elif isinstance(value, dict | list):
            size += sum(self.of((*path, key)) for key in (value if isinstance(value, dict) else range(len(value))))
        if size > _LARGEST:
            raise ConfigError(
                f"{'.'.join(map(str, path))}: grows beyond {_LARGEST} values with its references filled in"
            )
        self._known[path] = size
        return size

    def _target(self, path: _Path, reference: str) -> _Path:
        name = reference.lstrip(".")
        above = path[: max(len(path) - (len(reference) - len(name)), 0)] if reference.startswith(".") else ()
        parts = [part for part in re.split(r"[.\[\]]", name) if part]
        return (*above, *(int(part) if part.isdecimal() else part for part in parts))
