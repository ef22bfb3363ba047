"""The stages by name. Nothing is imported until a stage is asked for, so that listing them is quick."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from tokscale.base.config import did_you_mean
from tokscale.base.errors import ConfigError
from tokscale.dist.env import ProcessEnv
from tokscale.runs.stage import StageConfig, StageResult


@dataclass(frozen=True)
class Stage:
    """One program of the pipeline."""

    name: str
    """As typed: `tokscale train-tokenizer`; also its section in a recipe and the stem of its file of defaults."""
    module: str
    """Below `tokscale.stages`."""
    summary: str
    """One line for the list of stages."""
    positional_key: str = ""
    """The key that a first bare word gives: `tokscale bench attention`."""
    writes_exit_json: bool = True
    """Whether its outcome is left in the run folder; not for what only looks at one."""
    takes_all_sections: bool = False
    """Whether it is given the configuration of other stages beside its own."""


class StageModule(Protocol):
    """What a module of `tokscale.stages` offers."""

    CONFIG: type[StageConfig]
    run: Callable[[StageConfig, ProcessEnv], StageResult]


STAGES = {
    stage.name: stage
    for stage in (
        Stage("prepare", "prepare", "write a picture+caption data set as raw shards"),
        Stage("train-tokenizer", "train_tokenizer", "train an image tokenizer, or a text tokenizer on the captions"),
        Stage("tokenize", "tokenize", "turn raw shards into token shards"),
        Stage("train", "train", "train a model on token shards; goes on from its newest checkpoint"),
        Stage("export", "export", "consolidate a sharded checkpoint into a safetensors folder"),
        Stage("import", "import_weights", "turn weights of the original implementations into an export"),
        Stage("sample", "sample", "draw pictures for prompts from an export"),
        Stage("evaluate", "evaluate", "measure an export: prompt accuracy, reconstruction, losses"),
        Stage(
            "bench",
            "bench",
            "measure speed and memory against a baseline",
            positional_key="what",
            writes_exit_json=False,
        ),
        Stage("status", "status", "say what stands in a run folder", writes_exit_json=False),
        Stage("submit", "submit", "queue stages on a Slurm cluster", writes_exit_json=False, takes_all_sections=True),
    )
}


def available() -> dict[str, Stage]:
    """The stages whose program is installed, by name."""
    return {name: stage for name, stage in STAGES.items() if importlib.util.find_spec(_module(stage)) is not None}


def find(name: str) -> Stage:
    """The stage of that name; underscores are as good as hyphens.

    Raises:
        ConfigError: When there is none.
    """
    stages = available()
    stage = stages.get(name.replace("_", "-"))
    if stage is None:
        raise ConfigError(f"unknown stage {name!r}{did_you_mean(name, stages)}")
    return stage


def load(stage: Stage) -> StageModule:
    """Import the stage's program."""
    return cast(StageModule, importlib.import_module(_module(stage)))


def config_class(stage: Stage, values: Mapping[str, Any]) -> type[StageConfig]:
    """What the stage decodes; one that takes a word may have keys of its own for each.

    Raises:
        ConfigError: When the stage does not know the word.
    """
    module = load(stage)
    keys_of = getattr(module, "config_for", None)
    return keys_of(str(values.get(stage.positional_key) or "")) if keys_of is not None else module.CONFIG


def _module(stage: Stage) -> str:
    return f"tokscale.stages.{stage.module}"
