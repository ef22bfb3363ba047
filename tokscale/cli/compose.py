"""From files and words to one plain mapping: all that Hydra does here.

Later wins: the stage's own defaults (`configs/<stage>.yaml`), the recipe's `shared` section, its section for the stage,
groups chosen on the command line (`model=dalle/small`), and single keys (`model.dim=256`).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as compose_files
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokscale.base.config import did_you_mean
from tokscale.base.errors import ConfigError
from tokscale.base.package_data import share
from tokscale.runs.stage import StageConfig
from tokscale.stages import registry


def compose(stage: registry.Stage, words: Sequence[str]) -> dict[str, Any]:
    """The plain mapping that a stage decodes.

    Args:
        stage: Whose defaults and which section of the recipe.
        words: `recipe=...`, `group=choice`, `key=value`, and the bare first word of stages that take one.

    Raises:
        ConfigError: When a word, a file or a reference between values cannot be read.
    """
    configs = share("configs")
    chosen = [parse(word) for word in with_key(stage, words)]
    recipe = next((value for key, value in chosen if key == "recipe"), None)
    values = load(configs, stage.name) if (configs / f"{stage.name}.yaml").exists() else {}
    if recipe is not None:
        sections = load_recipe(configs, str(recipe))
        if unknown := sorted(sections.keys() - registry.STAGES.keys() - {"shared"}):
            advice = did_you_mean(unknown[0], ["shared", *registry.STAGES])
            raise ConfigError(f"recipe {recipe}: unknown section {unknown[0]!r}{advice}")
        values = merge(merge(values, sections.get("shared") or {}), sections.get(stage.name) or {})
    chosen = [(key, value) for key, value in chosen if key != "recipe"]
    for key, value in chosen:
        if isinstance(value, str) and is_group(configs, key):
            values[key] = load(configs, choice(configs, key, value))
    for key, value in chosen:
        if not (isinstance(value, str) and is_group(configs, key)):
            put(values, key, value)
    return resolve(values)


def compose_pipeline(stage: registry.Stage, words: Sequence[str]) -> dict[str, Any]:
    """What `submit` decodes: its own keys, and under `sections` what each stage would decode.

    Args:
        stage: `submit`.
        words: Its own keys, those that all stages share, and keys of one stage below its name: `train.batch_size=8`.
    """
    own = registry.load(stage).CONFIG
    mine, shared = [], []
    below: dict[str, list[str]] = {name: [] for name in registry.available()}
    for word in words:
        first, dot, _ = word.partition("=")[0].partition(".")
        name = first.replace("_", "-")
        if dot and name in below:
            below[name].append(word[len(first) + 1 :])
        elif first == "recipe" or first in StageConfig.model_fields:
            shared.append(word)
        else:
            mine.append(word)
    values = compose(stage, [*shared, *mine])
    stages = values.get("stages", own.model_fields["stages"].default)
    known = [name for name in stages if name in below]
    return values | {"sections": {name: compose(registry.find(name), [*shared, *below[name]]) for name in known}}


def with_key(stage: registry.Stage, words: Sequence[str]) -> list[str]:
    """The arguments of a stage, the bare first one given its key."""
    if stage.word and words and "=" not in words[0]:
        return [f"{stage.word}={words[0]}", *words[1:]]
    return list(words)


def parse(word: str) -> tuple[str, Any]:
    """One `key=value`; the value in Hydra's grammar: numbers, `true`, `null`, `[a, b]`, `{a: 1}`, quoted text.

    Raises:
        ConfigError: When it is not one.
    """
    key, equals, _ = word.partition("=")
    if not equals or not re.fullmatch(r"\+{0,2}[\w-]+(\.[\w-]+)*", key):
        raise ConfigError(f"{word!r}: not of the form key=value")
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"{word!r}: {reason}; put the value in quotes: '{key}=\"...\"'") from None
    if override.is_sweep_override():
        raise ConfigError(f"{word!r}: several values; a list is written '{key}=[a,b]'")
    return key.lstrip("+"), override.value()


def load(configs: Path, name: str, search: Path | None = None) -> dict[str, Any]:
    """Compose one file of `configs/` and what its defaults list names; references are left as they are."""
    overrides = [f"hydra.searchpath=[file://{search}]"] if search is not None else []
    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            composed = compose_files(name, overrides=overrides)
        values: Any = OmegaConf.to_container(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{configs / name}.yaml: {error}") from None
    for part in name.split("/")[:-1]:  # Hydra puts a file below the name of its folder
        values = values.get(part) or {}
    return values


def load_recipe(configs: Path, recipe: str) -> dict[str, Any]:
    """A recipe of `configs/recipe/`, or one's own file, which may name the shipped groups in its defaults list.

    Raises:
        ConfigError: When there is none of that name.
    """
    if recipe.endswith((".yaml", ".yml")):
        file = Path(recipe).absolute()
        if not file.is_file():
            raise ConfigError(f"recipe={recipe}: no such file")
        return load(file.parent, file.stem, search=configs)
    return load(configs, choice(configs, "recipe", recipe))


def is_group(configs: Path, key: str) -> bool:
    """Whether `key=name` chooses a file of `configs/<key>/`."""
    return re.fullmatch(r"[\w-]+", key) is not None and (configs / key).is_dir()


def choice(configs: Path, group: str, name: str) -> str:
    """The path of a group's choice below `configs`, without its ending.

    Raises:
        ConfigError: When there is none of that name.
    """
    folder = configs / group
    names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    if name not in names:
        raise ConfigError(f"{group}={name}: no such file in {folder}{did_you_mean(name, names)}")
    return f"{group}/{name}"


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, key by key; a mapping of another `kind` replaces instead, since its keys are others."""
    merged = dict(below)
    for key, value in above.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and value.get("kind") in (None, before.get("kind")):
            value = merge(before, value)
        merged[key] = value
    return merged


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.c` in nested mappings.

    Raises:
        ConfigError: When something on the way is no mapping.
    """
    *path, last = key.split(".")
    for depth, part in enumerate(path, 1):
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {'.'.join(path[:depth])} is {values!r} and has no keys below it")
    values[last] = value


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in `${references}` and refuse what is still `???`.

    Raises:
        ConfigError: When a reference leads nowhere.
    """
    try:
        tree = OmegaConf.create(dict(values))
        plain: Any = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).split("\n")[0]) from None
    return plain
