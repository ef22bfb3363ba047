"""Named entries of one sort, to which a module adds its own; and the type of a name of one in a configuration."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from tokscale.base.config import did_you_mean
from tokscale.base.errors import ConfigError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Entries by name, in the order in which they were added.

    Args:
        what: What an entry is, for messages: `"attention kind"`.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Add an entry under a new name.

        Raises:
            TypeError: When the name is taken: two modules claim it, which is a defect of one of them.
        """
        if name in self._entries:
            raise TypeError(f"{self.what} {name!r} is there already: {self._entries[name]!r}")
        self._entries[name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Take an entry away again."""
        del self._entries[name]

    def find(self, name: str, where: str = "") -> T:
        """The entry of that name.

        Raises:
            ConfigError: When there is none; the message begins with `where` and offers the nearest name.
        """
        if name not in self._entries:
            raise ConfigError(f"{where or self.what}: got {name!r}{did_you_mean(name, self._entries)}")
        return self._entries[name]

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class NameIn:
    """Annotation of a string in a configuration that names an entry of a registry: `Annotated[str, NameIn(KINDS)]`.

    Names are looked up when a value is decoded, so that entries may be added until then.
    """

    registry: Registry[Any]
    allowed: Callable[[Any], bool] = lambda entry: True
    """Which entries may be named here."""

    def names(self) -> tuple[str, ...]:
        """The legal names."""
        return tuple(name for name, entry in self.registry.items() if self.allowed(entry))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Pydantic's hook: a string that is one of `names`."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        if name not in self.names():
            raise ValueError(f"got {name!r}{did_you_mean(name, self.names())}")
        return name
