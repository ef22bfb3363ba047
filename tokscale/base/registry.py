"""Named entries of one sort, to which a module adds its own; and the type of a name of one in a configuration."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Literal, TypeVar, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, SerializationInfo, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from tokscale.base.config import Config, did_you_mean, kind_of
from tokscale.base.errors import ConfigError
from tokscale.base.log import logger

log = logger("registry")
T = TypeVar("T")
B = TypeVar("B")


class Registry(Mapping[str, T], Generic[T]):
    """Entries by name, in the order in which they were added; those of other packages come after, when first asked for.

    Args:
        what: What an entry is, for messages: `"attention kind"`.
        group: Name of the entry-point group under which installed packages offer entries, if they may.
        admit: Makes an entry of what such a package offers under a name.

    Raises:
        ConfigError: From a look-up, when another package's entry cannot be imported, or is none.
    """

    def __init__(self, what: str, *, group: str = "", admit: Callable[[str, Any], T] | None = None) -> None:
        self.what, self.group = what, group
        self._admit = admit
        self._entries: dict[str, T] = {}

    # A registry is the one that it is; annotations of types hold it, and those are hashed.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType] - Mapping takes it away

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
        if name not in self:
            raise ConfigError(f"{where or self.what}: got {name!r}{self.advice(name)}")
        return self[name]

    def advice(self, name: str, names: Iterable[str] | None = None) -> str:
        """What a message about an unknown name goes on with: the nearest of `names`, and where others come from."""
        more = f"; one of another package needs that package installed (entry points of the group {self.group})"
        return did_you_mean(name, self if names is None else names) + (more if self.group else "")

    def loaded(self, name: str) -> T | None:
        """The entry of that name, if it is one that needs no further import."""
        return self._entries.get(name)

    def usable(self) -> dict[str, T]:
        """All entries that can be imported; a package that cannot must not take the others away."""
        found = {}
        for name in self:
            try:
                found[name] = self[name]
            except ConfigError as error:
                log.warning("%s", error)
        return found

    def _offers(self) -> dict[str, EntryPoint]:
        return {offer.name: offer for offer in entry_points(group=self.group)} if self.group else {}

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            offer = self._offers()[name]
            assert self._admit is not None
            try:
                self._entries[name] = self._admit(name, offer.load())
            except Exception as error:
                package = offer.dist.name if offer.dist is not None else offer.module
                raise ConfigError(
                    f"{self.what}: {name!r} of the installed package {package} cannot be used: "
                    f"{type(error).__name__}: {error}; mend that package, or uninstall it"
                ) from error
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._entries, *self._offers()]))

    def __len__(self) -> int:
        return len(list(iter(self)))


def admitted(name: str, offered: Any, base: type[B], parts: Iterable[str], configs: Mapping[str, bool]) -> type[B]:
    """A class that a package offers under a name, if it is a whole one.

    Args:
        name: The `kind` by which it is asked for.
        offered: What the entry point gave.
        base: What it must be a subclass of.
        parts: Names of what it must have beside its abstract methods.
        configs: Names of its configuration classes, which must have that kind, and whether each may be None.

    Raises:
        TypeError: Saying what it lacks.
    """
    if not (inspect.isclass(offered) and issubclass(offered, base)):
        raise TypeError(f"{offered!r} is no subclass of {base.__module__}.{base.__name__}")
    missing = sorted(getattr(offered, "__abstractmethods__", ()))
    missing += [part for part in (*configs, *parts) if not hasattr(offered, part)]
    if missing:
        raise TypeError(f"{offered.__name__} lacks {', '.join(missing)}")
    for part, optional in configs.items():
        config = getattr(offered, part)
        if optional and config is None:
            continue
        if not (inspect.isclass(config) and issubclass(config, Config)):
            raise TypeError(f"{part} of {offered.__name__} is {config!r}, no configuration")
        kinds = get_args(config.model_fields["kind"].annotation) if "kind" in config.model_fields else ()
        if name not in kinds:
            raise TypeError(
                f"the configuration of {offered.__name__} has kind={', '.join(map(repr, kinds))}, not {name!r}"
            )
    return offered


@dataclass(frozen=True, eq=False)
class NameIn:
    """Annotation of a string in a configuration that names an entry of a registry: `Annotated[str, NameIn(KINDS)]`.

    Names are looked up when a value is decoded, so that entries may be added until then.
    """

    registry: Registry[Any]
    allowed: Callable[[Any], bool] = lambda entry: True
    """Which entries may be named here."""

    def names(self) -> tuple[str, ...]:
        """The legal names."""
        return tuple(name for name, entry in self.registry.usable().items() if self.allowed(entry))

    def members(self) -> list[Any]:
        """What a reader is shown: the names, as a `Literal` would be."""
        return [Literal[self.names()]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Pydantic's hook: a string that is one of `names`."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        entry = self.registry.loaded(name)  # a list of a million names is looked at name by name
        if entry is not None and self.allowed(entry):
            return name
        if name not in self.names():
            raise ValueError(f"got {name!r}{did_you_mean(name, self.names())}")
        return name


@dataclass(frozen=True, eq=False)
class ConfigOf:
    """Annotation of a configuration whose `kind` names an entry of a registry: `Annotated[Base, ConfigOf(KINDS)]`.

    Like a union discriminated by `kind`, but entries may be added until a value is decoded.
    """

    registry: Registry[Any]
    config_of: Callable[[Any], type[Config]]
    """The configuration class of an entry."""
    allowed: Callable[[Any], bool] = lambda entry: True
    """Which entries may be asked for here."""
    also: "ConfigOf | None" = None
    """Those of another registry that may be asked for in the same place."""

    def members(self) -> tuple[type[Config], ...]:
        """The configuration classes."""
        entries = [entry for entry in self.registry.usable().values() if self.allowed(entry)]
        return (*(self.config_of(entry) for entry in entries), *(self.also.members() if self.also else ()))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Pydantic's hook."""
        del source, handler
        return core_schema.no_info_plain_validator_function(
            self._decode,
            serialization=core_schema.plain_serializer_function_ser_schema(_encode, info_arg=True),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Pydantic's hook: any of those known now."""
        del schema
        return {"anyOf": [handler(member.__pydantic_core_schema__) for member in self.members()]}

    def _decode(self, value: Any) -> Config:
        if isinstance(value, Config):
            kind = str(getattr(value, "kind", ""))
        elif isinstance(value, Mapping):
            if "kind" not in value:
                raise PydanticCustomError("kind_required", "{text}", {"text": "required, but not given"})
            kind = str(value["kind"])
        else:
            raise PydanticCustomError("keys_expected", "{text}", {"text": "input should be keys and values"})
        known = self._class_of(kind)
        if known is None:
            names = [kind_of(member) for member in self.members()]
            text = f"got {kind!r}{self.registry.advice(kind, names)}"
            raise PydanticCustomError("unknown_kind", "{text}", {"text": text})
        if isinstance(value, known):
            return value
        try:
            return known.model_validate(dict(value) if isinstance(value, Mapping) else value)
        except ValidationError as error:
            # The kind goes into the location, as pydantic does it for unions, so that readers find the class.
            problems = [
                InitErrorDetails(
                    type=_same_problem(problem),
                    loc=(kind, *problem["loc"]),
                    input=problem["input"],
                    ctx=problem.get("ctx", {}),
                )
                for problem in error.errors(include_url=False)
            ]
            raise ValidationError.from_exception_data(error.title, problems) from None

    def _class_of(self, kind: str) -> type[Config] | None:
        if kind in self.registry and self.allowed(self.registry[kind]):
            return self.config_of(self.registry[kind])
        return self.also._class_of(kind) if self.also else None


def _same_problem(problem: Any) -> Any:
    custom = problem["type"] in ("unknown_kind", "keys_expected", "kind_required")
    return PydanticCustomError(problem["type"], "{text}", problem["ctx"]) if custom else problem["type"]


def _encode(value: Config, info: SerializationInfo) -> dict[str, Any]:
    return value.model_dump(mode=info.mode)
