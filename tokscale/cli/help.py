"""What the command line says: the list of stages, the keys of one, the end of a run."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokscale.base.describe import describe
from tokscale.base.package_data import package_data_path
from tokscale.runs.stage import StageConfig, StageResult
from tokscale.stages import registry


def overview() -> str:
    """What `tokscale --help` prints."""
    stages = registry.available().values()
    width = max(len(stage.name) for stage in stages)
    lines = [f"  {stage.name:<{width}}  {stage.summary}" for stage in stages]
    return "\n".join(
        [
            "usage: tokscale <stage> [recipe=NAME] [group=NAME ...] [key=value ...]",
            "       tokscale <stage> --help     every key of a stage, with its meaning and default",
            "",
            "stages:",
            *lines,
            "",
            f"recipes, groups and defaults are files of {package_data_path('configs')}",
        ]
    )


def usage(stage: registry.Stage, words: Sequence[str] = ()) -> str:
    """What `tokscale <stage> --help` prints: every key with its default and meaning."""
    module = registry.load(stage)
    word = words[0] if stage.positional_key and words and not words[0].startswith("-") else ""
    config = registry.config_class(stage, {stage.positional_key: word}) if word else module.CONFIG
    configs = package_data_path("configs")
    groups = [folder.name for folder in sorted(configs.iterdir()) if folder.is_dir() and folder.name != "recipe"]
    here = [group for group in groups if group in config.model_fields]
    choices = [f"  {group}={'|'.join(_names(configs / group))}" for group in here]
    taken = f"{word or f'<{stage.positional_key}>'} " if stage.positional_key else ""
    known: Mapping[str, str] = getattr(module, "whats", dict)()
    return "\n".join(
        [
            f"usage: tokscale {stage.name} {taken}[recipe=NAME] [key=value ...]",
            "",
            (module.__doc__ or stage.summary).strip(),
            "",
            *(
                [f"<{stage.positional_key}>:", *(f"  {name:<10}  {text}" for name, text in known.items()), ""]
                if known
                else []
            ),
            *(["groups:", *choices, ""] if choices else []),
            "keys:",
            describe(config),
        ]
    )


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def report(name: str, result: StageResult, words: Sequence[str]) -> str:
    """The end of a stage, for a person: what was made, where, and how to go on."""
    lines = [f"{name}: {'already done: ' if result.skipped else ''}{result.summary}"]
    lines += [f"  {label}: {path}" for label, path in result.outputs.items()]
    if result.next_command:
        lines.append(f"  next: {next_command(result, words)}")
    return "\n".join(lines)


def next_command(result: StageResult, words: Sequence[str]) -> str:
    """The command that continues the road, as it can be typed.

    A stage knows folders; whoever works from a recipe goes on with the recipe, and with the shared keys that he typed.

    Args:
        result: Of the stage that has ended.
        words: What was typed for it.
    """
    program, stage, *given = shlex.split(result.next_command)
    if program != "tokscale":
        return result.next_command
    recipe = next((word for word in words if word.startswith("recipe=")), None)
    if result.next_keeps:
        own = {_key(word) for word in given}
        return shlex.join([program, stage, *(word for word in words if _key(word) not in own), *given])
    spoken_for: set[str] = set()
    if recipe is not None:
        from tokscale.cli.compose import load_recipe  # only here, since Hydra takes half a second

        sections = load_recipe(package_data_path("configs"), recipe.partition("=")[2])
        spoken_for = set(sections.get(stage) or ()) | set(sections.get("shared") or ())
        typed = [word for word in words if _key(word) in {*StageConfig.model_fields, "recipe"}]
        given = [*typed, *(word for word in given if _key(word) not in StageConfig.model_fields)]
    suggested = [word for word in result.next_suggested if _key(word).partition(".")[0] not in spoken_for]
    return shlex.join([program, stage, *given, *suggested])


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")
