"""From files and words to one plain mapping: all that Hydra does here.

Later wins: the stage's own defaults (`configs/<stage>.yaml`), the recipe's `shared` section, its section for the stage,
groups chosen on the command line (`model=dalle/small`), and single keys (`model.dim=256`).
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as compose_files
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from pydantic import BaseModel

from tokscale.base.config import PathKey, decode, did_you_mean
from tokscale.base.errors import ConfigError
from tokscale.base.package_data import package_data_path
from tokscale.base.strict_yaml import read_yaml
from tokscale.cli.references import resolve
from tokscale.cli.settings import SETTINGS, keep_settings
from tokscale.cli.values import form_of, parse, split
from tokscale.runs.stage import StageConfig
from tokscale.stages import registry


def compose(stage: registry.Stage, overrides: Sequence[str]) -> dict[str, Any]:
    """The plain mapping that a stage decodes.

    Args:
        stage: Whose defaults and which section of the recipe.
        overrides: `recipe=...`, `group=choice`, `key=value`, and the bare first word of stages that take one.

    Raises:
        ConfigError: When a word, a file or a reference between values cannot be read.
    """
    configs = package_data_path("configs")
    typed = [split(word) for word in with_key(stage, overrides)]
    recipe = next((text for key, text in typed if key == "recipe"), None)
    config = registry.config_class(stage, {key: text for key, text in typed if key == stage.positional_key})
    chosen = [(key, parse(key, text, form_of(config, key))) for key, text in typed if key != "recipe"]
    values = load_file(configs, stage.name) if (configs / f"{stage.name}.yaml").exists() else {}
    if recipe is not None:
        sections = load_recipe(configs, recipe)
        if unknown := sorted(sections.keys() - registry.STAGES.keys() - {"shared"}):
            advice = did_you_mean(unknown[0], ["shared", *registry.STAGES])
            raise ConfigError(f"recipe {recipe}: unknown section {unknown[0]!r}{advice}")
        for name in ("shared", stage.name):
            section = sections.get(name) or {}
            if not isinstance(section, dict):
                raise ConfigError(f"recipe {recipe}: section {name!r} is {section!r:.100}; it must hold keys")
            values = merge_values(values, section)
    for key, value in chosen:
        if isinstance(value, str) and is_group(configs, key):
            found, before = load_file(configs, choice(configs, key, value)), values.get(key)
            if key in SETTINGS and isinstance(before, dict):
                found = keep_settings(config, key, value, before, found)
            values[key] = found
    single = [(key, value) for key, value in chosen if not (isinstance(value, str) and is_group(configs, key))]
    # Whoever chooses another kind has not given the keys of the one before, whatever file did.
    for key, value in sorted((pair for pair in single if pair[0].endswith(".kind")), key=lambda pair: len(pair[0])):
        drop_other_kind(values, key, value, config)
    for key, value in single:
        put(values, key, value)
    return resolve(values)


def compose_pipeline(stage: registry.Stage, overrides: Sequence[str]) -> dict[str, Any]:
    """What `submit` decodes: its own keys, and under `sections` what each stage would decode.

    Args:
        stage: `submit`.
        overrides: Its own keys, those that all stages share, and those of one stage below its name:
            `train.batch_size=8`.
    """
    module: Any = registry.import_stage(stage)  # which alone has `programs_of`
    mine, shared = [], []
    below: dict[str, list[str]] = {name: [] for name in registry.available()}
    for word in overrides:
        first, dot, _ = word.partition("=")[0].partition(".")
        name = first.replace("_", "-")
        if dot and name in below:
            below[name].append(word[len(first) + 1 :])
        elif first == "recipe" or first in StageConfig.model_fields:
            shared.append(word)
        else:
            mine.append(word)
    values = compose(stage, [*shared, *mine])
    programs = module.programs_of(values)
    return values | {
        "sections": {
            name: compose(registry.find(program), [*shared, *below[program]])
            for name, program in programs.items()
            if program in below
        }
    }


def with_key(stage: registry.Stage, overrides: Sequence[str]) -> list[str]:
    """The arguments of a stage, the bare first one given its key; all bare first ones, where it takes several."""
    if stage.takes_several_words:
        words = list(itertools.takewhile(lambda word: "=" not in word and not word.startswith("-"), overrides))
        if words:
            return [f"{stage.positional_key}={json.dumps(words)}", *overrides[len(words) :]]
    elif stage.positional_key and overrides and "=" not in overrides[0]:
        return [f"{stage.positional_key}={overrides[0]}", *overrides[1:]]
    return list(overrides)


def load_file(configs: Path, name: str, search: Path | None = None) -> dict[str, Any]:
    """Compose one file of `configs/` and what its defaults list names; references are left as they are."""
    overrides = [f"hydra.searchpath=['file://{search}']"] if search is not None else []
    file = configs / f"{name}.yaml"
    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            composed = compose_files(name, overrides=overrides)
        values: Any = OmegaConf.to_container(composed)
    except Exception as error:  # of defaults lists that are none, files that are not there: not all are of one family
        reason = str(error).split("\n\nConfig search path")[0].strip() or type(error).__name__
        raise ConfigError(f"{file}: cannot be composed: {' '.join(reason.split())[:500]}") from None
    for part in name.split("/")[:-1]:  # Hydra puts a file below the name of its folder
        values = values.get(part) or {}
    return values


def load_recipe(configs: Path, recipe: str) -> dict[str, Any]:
    """A recipe of `configs/recipe/`, or one's own file, which may name the shipped groups in its defaults list.

    Raises:
        ConfigError: When there is none of that name.
    """
    if recipe.endswith((".yaml", ".yml")):
        path: Path = decode(PathKey, recipe, where="recipe")
        file = path.absolute()
        if not file.exists():
            raise ConfigError(f"recipe={recipe}: no such file")
        for below in _files_of(file):
            read_yaml(below)  # refused by line, before Hydra builds anything from it
        return load_file(file.parent, file.stem, search=configs)
    return load_file(configs, choice(configs, "recipe", recipe))


def _files_of(file: Path) -> Iterator[Path]:
    """A file of one's own, and those beside it that its defaults list may name, and theirs."""
    waiting, seen = [file], set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        yield path
        defaults = read_yaml(path).get("defaults")
        for entry in defaults if isinstance(defaults, list) else []:
            for group, names in entry.items() if isinstance(entry, dict) else [("", entry)]:
                group = str(group).removeprefix("override ").removeprefix("optional ").partition("@")[0]
                for name in names if isinstance(names, list) else [names]:
                    near = (
                        file.parent / group.lstrip("/") / str(name).partition("@")[0].strip("/").removesuffix(".yaml")
                    )
                    near = near.with_name(f"{near.name}.yaml")
                    if near.exists():
                        waiting.append(near)


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


def merge_values(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, key by key; a mapping of another `kind` replaces instead, since its keys are others."""
    merged = dict(below)
    for key, value in above.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and value.get("kind") in (None, before.get("kind")):
            value = merge_values(before, value)
        merged[key] = value
    return merged


def drop_other_kind(values: dict[str, Any], key: str, kind: Any, config: Any) -> None:
    """Before `a.b.kind` is set: what files say below `a.b` about another kind is taken away."""
    here: Any = values
    *path, last, _ = key.split(".")
    default: Any = config
    for part in path:
        here = here.get(part) if isinstance(here, dict) else None
        default = _default(default, part)
    before = here.get(last) if isinstance(here, dict) else None
    if isinstance(before, dict) and before.get("kind", getattr(_default(default, last), "kind", kind)) != kind:
        here[last] = {}


def _default(config: Any, name: str) -> Any:
    """What a key is by itself: of a class, or of a default that stands in one."""
    if isinstance(config, BaseModel):
        return getattr(config, name, None)
    fields = getattr(config, "model_fields", {})
    return fields[name].default if name in fields else None


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
