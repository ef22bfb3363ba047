"""What the command line says: the list of stages, the keys of one, the end of a run."""

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from tokscale.base.config import did_you_mean
from tokscale.base.describe import classes_below, describe, describe_key, heading, outline
from tokscale.base.errors import ConfigError
from tokscale.base.package_data import package_data_path
from tokscale.runs.stage import StageConfig, StageResult
from tokscale.stages import registry

_WIDTH = 110
"""Of a line."""


def overview() -> str:
    """What `tokscale --help` prints."""
    stages = registry.available().values()
    width = max(len(stage.name) for stage in stages)
    lines = [f"  {stage.name:<{width}}  {stage.summary}" for stage in stages]
    return "\n".join(
        [
            "usage: tokscale <stage> [recipe=NAME] [group=NAME ...] [key=value ...]",
            "       tokscale <stage> --help [key | all]     its keys, those below one, or every key with its meaning",
            "       tokscale completion bash|zsh            a script that completes all of this in a shell",
            "",
            "stages:",
            *lines,
            "",
            f"recipes, groups and defaults are files of {package_data_path('configs')}",
        ]
    )


def usage(stage: registry.Stage, overrides: Sequence[str] = ()) -> str:
    """What `tokscale <stage> --help` prints: one screen, or what the word behind `--help` asks for.

    Args:
        stage: Whose keys.
        overrides: As typed. `--help all` shows every key, `--help engine` those of one, `model=dalle/small --help`
            those of the model that is chosen.

    Raises:
        ConfigError: When there are no such keys.
    """
    module = registry.import_stage(stage)
    asked = _asked_for(overrides)
    word = (
        overrides[0]
        if stage.positional_key and overrides and "=" not in overrides[0] and not overrides[0].startswith("-")
        else ""
    )
    config = registry.config_class(stage, {stage.positional_key: word}) if word else module.CONFIG
    if asked == "all":
        return "\n".join([*_top(stage, module, word, config), "keys:", describe(config)])
    groups = _groups(config)
    if asked:
        return _below(config, asked)
    if chosen := next((other for other in overrides if _key(other) in groups and "=" in other), None):
        return _of_choice(config, *chosen.split("=", 1))
    title = "keys (--help KEY for what is below one, --help all for everything):"
    return "\n".join([*_top(stage, module, word, config), title, outline(config)])


def _asked_for(overrides: Sequence[str]) -> str:
    at = next((number for number, word in enumerate(overrides) if word in ("-h", "--help")), len(overrides))
    behind = overrides[at + 1 :]
    return behind[0] if behind and "=" not in behind[0] and not behind[0].startswith("-") else ""


def _top(stage: registry.Stage, module: registry.StageModule, word: str, config: type[StageConfig]) -> list[str]:
    taken = f"{word or f'<{stage.positional_key}>'} " if stage.positional_key else ""
    known: Mapping[str, str] = getattr(module, "whats", dict)()
    choices = [
        textwrap.shorten(f"{group}={'|'.join(_names(folder))}".replace("|", " | "), _WIDTH, placeholder=" ...")
        for group, folder in _groups(config).items()
    ]
    whats = [f"<{stage.positional_key}>:", *(f"  {name:<10}  {text}" for name, text in known.items()), ""]
    return [
        f"usage: tokscale {stage.name} {taken}[recipe=NAME] [key=value ...]",
        "",
        (module.__doc__ or stage.summary).strip(),
        "",
        *(whats if known else []),
        *(["groups:", *(f"  {line.replace(' | ', '|')}" for line in choices), ""] if choices else []),
    ]


def _groups(config: type[StageConfig]) -> dict[str, Path]:
    """The groups of files that a stage's keys may be chosen from, with their folders."""
    configs = package_data_path("configs")
    return {
        folder.name: folder
        for folder in sorted(configs.iterdir())
        if folder.is_dir() and folder.name in config.model_fields
    }


def _below(config: type[StageConfig], key: str) -> str:
    """The keys below one; of several kinds, what there is to choose from."""
    *path, last = key.split(".")
    holders = classes_below(config, path)
    found = classes_below(config, [*path, last])
    if not found and any(last in holder.model_fields for holder in holders):
        lines = [describe_key(holder, last) for holder in holders if last in holder.model_fields]
        return "\n".join(dict.fromkeys(lines))
    if not found:
        names = [name for holder in holders for name in holder.model_fields] or list(config.model_fields)
        raise ConfigError(f"--help {key}: there is no such key{did_you_mean(last, names)}")
    if len(found) == 1:
        return f"{key}: {heading(found[0])}\n{describe(found[0])}"
    group = _groups(config).get(key)
    files = [f"files: {key}={'|'.join(_names(group))}", ""] if group is not None else []
    ways = [f"  {key}.{heading(kind).partition(':')[0].removeprefix('kind=')}  {heading(kind)}" for kind in found]
    return "\n".join([*files, f"{key} is one of these; --help {key}.KIND shows the keys of one:", *ways])


def _of_choice(config: type[StageConfig], group: str, name: str) -> str:
    """The keys of what `group=name` chooses, with the values that its file gives them."""
    from tokscale.cli.compose import choice, load_file  # only here, since Hydra takes half a second

    configs = package_data_path("configs")
    values = load_file(configs, choice(configs, group, name))
    kinds = classes_below(config, [group])
    named = [kind for kind in kinds if heading(kind).startswith(f"kind={values.get('kind')}:")]
    shown = (named or kinds)[:1]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None)
    lines = [f"{group}={name} says:", *(f"  {line}" for line in text.splitlines()), ""]
    for kind in shown:
        lines += [f"all keys of {group}, {heading(kind)}", describe(kind)]
    return "\n".join(lines)


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def report(name: str, result: StageResult, overrides: Sequence[str]) -> str:
    """The end of a stage, for a person: what was made, where, and how to go on."""
    lines = [f"{name}: {'already done: ' if result.skipped else ''}{result.summary}"]
    lines += [f"  {label}: {path}" for label, path in result.outputs.items()]
    if result.next_command:
        lines.append(f"  next: {next_command(result, overrides)}")
    return "\n".join(lines)


def next_command(result: StageResult, overrides: Sequence[str]) -> str:
    """The command that continues the pipeline, as it can be typed.

    A stage knows folders; whoever works from a recipe goes on with the recipe, and with the shared keys that he typed.

    Args:
        result: Of the stage that has ended.
        overrides: What was typed for it.
    """
    program, stage, *given = shlex.split(result.next_command)
    if program != "tokscale":
        return result.next_command
    recipe = next((word for word in overrides if word.startswith("recipe=")), None)
    if result.next_keeps:
        own = {_key(word) for word in given}
        return shlex.join([program, stage, *(word for word in overrides if _key(word) not in own), *given])
    spoken_for: set[str] = set()
    if recipe is not None:
        from tokscale.cli.compose import load_recipe  # only here, since Hydra takes half a second

        sections = load_recipe(package_data_path("configs"), recipe.partition("=")[2])
        spoken_for = set(sections.get(stage) or ()) | set(sections.get("shared") or ())
        typed = [word for word in overrides if _key(word) in {*StageConfig.model_fields, "recipe"}]
        given = [*typed, *(word for word in given if _key(word) not in StageConfig.model_fields)]
    suggested = [word for word in result.next_suggested if _key(word).partition(".")[0] not in spoken_for]
    return shlex.join([program, stage, *given, *suggested])


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")
