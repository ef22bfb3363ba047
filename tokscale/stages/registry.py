"""The stages by name. Nothing is imported until a stage is asked for, so that listing them is quick."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from tokscale.base.errors import ConfigError
from tokscale.base.registry import Registry
from tokscale.dist.env import ProcessEnv
from tokscale.runs.stage import StageConfig, StageResult


@dataclass(frozen=True)
class Stage:
    """One program of the pipeline."""

    name: str
    """As typed: `tokscale train-tokenizer`; also its section in a recipe and the stem of its file of defaults."""
    module: str
    """Below `tokscale.stages`; of another package, its whole name."""
    summary: str
    """One line for the list of stages."""
    positional_key: str = ""
    """The key that a first bare word gives: `tokscale bench attention`."""
    takes_several_words: bool = False
    """Whether it takes all first bare words, as a list: `tokscale compare runs/a runs/b`."""
    writes_exit_json: bool = True
    """Whether its outcome is left in the run folder; not for what only looks at one."""
    takes_all_sections: bool = False
    """Whether it is given the configuration of other stages beside its own."""
    is_outside: bool = False
    """Whether it comes with another package."""


class StageModule(Protocol):
    """What a module of `tokscale.stages` offers."""

    CONFIG: type[StageConfig]
    run: Callable[[StageConfig, ProcessEnv], StageResult]


def _admitted(name: str, offered: Any) -> Stage:
    """A stage, if that is what a package offers.

    Raises:
        TypeError: When it is no module with a `CONFIG` and a `run`.
    """
    if not (inspect.ismodule(offered) and callable(getattr(offered, "run", None))):
        raise TypeError(f"{offered!r} is no module with a function `run`")
    config = getattr(offered, "CONFIG", None)
    if not (inspect.isclass(config) and issubclass(config, StageConfig)):
        raise TypeError(f"{offered.__name__}.CONFIG: got {config!r}, which is no subclass of StageConfig")
    summary = (offered.__doc__ or offered.__name__).strip().split("\n")[0]
    return Stage(name, offered.__name__, summary, is_outside=True)


STAGES: Registry[Stage] = Registry("stage", group="tokscale.stages", admit=_admitted)
"""By name. Installed packages add theirs: modules with `CONFIG` and `run`."""
for _stage in (
    Stage(
        "init",
        "init",
        "look at your images and write a recipe for them",
        positional_key="source",
        writes_exit_json=False,
    ),
    Stage("prepare", "prepare", "write an image+caption data set as raw shards"),
    Stage("train-tokenizer", "train_tokenizer", "train an image tokenizer, or a text tokenizer on the captions"),
    Stage("tokenize", "tokenize", "turn raw shards into token shards"),
    Stage("train", "train", "train a model on token shards; goes on from its newest checkpoint"),
    Stage("export", "export", "consolidate a sharded checkpoint into a safetensors folder"),
    Stage("import", "import_weights", "turn weights of the original implementations into an export"),
    Stage("sample", "sample", "draw images for prompts from an export"),
    Stage("evaluate", "evaluate", "measure an export: prompt accuracy, reconstruction, losses"),
    Stage(
        "bench",
        "bench",
        "measure speed and memory against a baseline",
        positional_key="what",
        writes_exit_json=False,
    ),
    Stage("report", "report", "a run as one HTML file", writes_exit_json=False),
    Stage(
        "compare",
        "compare",
        "several runs side by side, as a table and one HTML file",
        positional_key="runs",
        takes_several_words=True,
        writes_exit_json=False,
    ),
    Stage("status", "status", "say what stands in a run folder", writes_exit_json=False),
    Stage("check", "check", "look at what a cluster gives a job, from inside", writes_exit_json=False),
    Stage("submit", "submit", "queue stages on a Slurm cluster", writes_exit_json=False, takes_all_sections=True),
):
    STAGES.add(_stage.name, _stage)


def available() -> dict[str, Stage]:
    """The stages whose program is installed, by name."""
    return {name: s for name, s in STAGES.usable().items() if importlib.util.find_spec(_module(s)) is not None}


def find(name: str) -> Stage:
    """The stage of that name; underscores are as good as hyphens.

    Raises:
        ConfigError: When there is none.
    """
    stages = available()
    stage = stages.get(name.replace("_", "-"))
    if stage is None:
        raise ConfigError(f"unknown stage {name!r}{STAGES.advice(name, stages)}")
    return stage


def import_stage(stage: Stage) -> StageModule:
    """Import the stage's program."""
    return cast(StageModule, importlib.import_module(_module(stage)))


def config_class(stage: Stage, values: Mapping[str, Any]) -> type[StageConfig]:
    """What the stage decodes; one that takes a word may have keys of its own for each.

    Raises:
        ConfigError: When the stage does not know the word.
    """
    module = import_stage(stage)
    keys_of = getattr(module, "config_for", None)
    return keys_of(str(values.get(stage.positional_key) or "")) if keys_of is not None else module.CONFIG


def _module(stage: Stage) -> str:
    return stage.module if stage.is_outside else f"tokscale.stages.{stage.module}"
