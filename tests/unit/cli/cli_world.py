"""A stage of one's own and a folder of configurations, for the tests of the command line."""

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from tokscale.base.config import Config
from tokscale.base.errors import DataError
from tokscale.base.registry import Registry
from tokscale.cli import compose
from tokscale.cli import help as words
from tokscale.dist.env import ProcessEnv
from tokscale.runs.lock import RunFolderInUseError
from tokscale.runs.run_folder import RunConfigMismatchError
from tokscale.runs.stage import StageConfig, StageResult
from tokscale.stages import registry

FILES = {
    "draw.yaml": "defaults:\n  - engine: eager\n  - _self_\ncount: 3\n",
    "engine/eager.yaml": "kind: eager\n",
    "engine/zero2.yaml": "kind: zero\nstage: 2\n",
    "engine/zero3.yaml": "kind: zero\nstage: 3\n",
    "model/cat/small.yaml": "kind: cat\ndim: 8\nwhiskers: 4\n",
    "model/cat/large.yaml": "defaults:\n  - /model/cat/small@_here_\n  - _self_\ndim: 64\n",
    "model/dog/small.yaml": "kind: dog\ndim: 16\n",
    "recipe/quick/pets.yaml": """
defaults:
  - /model/cat@draw.model: small
  - _self_
shared:
  run_dir: runs/pets
  data_dir: ${run_dir}/data
  seed: 5
draw:
  count: 7
  seed: 6
  note: seed ${seed} in ${data_dir}
  engine:
    kind: zero
    stage: 2
tell-tale:
  loud: true
""",
    "recipe/bad.yaml": "shared:\n  seed: 1\ntell-tail:\n  loud: true\n",
}


class Cat(Config):
    """Purrs."""

    kind: Literal["cat"] = "cat"
    dim: int = 4
    """Length of the cat."""
    whiskers: int = 2


class Dog(Config):
    """Barks."""

    kind: Literal["dog"] = "dog"
    dim: int = 4
    """Length of the dog."""


class Eager(Config):
    kind: Literal["eager"] = "eager"
    dtype: Literal["auto", "fp32"] = "fp32"


class Zero(Config):
    kind: Literal["zero"] = "zero"
    stage: int = 1
    dtype: Literal["auto", "fp32"] = "fp32"
    divided_early: bool = False

    @model_validator(mode="after")
    def _coherent(self) -> "Zero":
        if self.divided_early and self.stage != 3:
            raise ValueError(f"divided_early needs stage 3, not {self.stage}")
        return self


class DrawConfig(StageConfig):
    model: Annotated[Cat | Dog, Field(discriminator="kind")]
    """Who is drawn."""
    engine: Annotated[Eager | Zero, Field(discriminator="kind")] = Eager()
    count: int = 1
    """How many."""
    note: str = ""
    prompts: tuple[str, ...] = ()
    rate: float | None = None
    fail: str = ""


class TellConfig(StageConfig):
    what: Literal["truth", "tale"]
    loud: bool = False


def _draw(config: DrawConfig, env: ProcessEnv) -> StageResult:
    SEEN.append(config)
    match config.fail:
        case "data":
            raise DataError("shard 7 is torn")
        case "bug":
            raise ZeroDivisionError("one over nothing")
        case "in use":
            raise RunFolderInUseError("another job draws there")
        case "another run":
            raise RunConfigMismatchError("the folder holds another drawing")
        case "disk":
            raise OSError(28, "No space left on device")
        case "interrupt":
            raise KeyboardInterrupt
    return StageResult(
        f"drew {config.count}",
        outputs={"grid": config.run_dir / "grid.png"},
        metrics={"per_second": 2.5},
        next_command=f"tokscale tell-tale run_dir={config.run_dir}",
        skipped=config.count == 0,
    )


def _tell(config: TellConfig, env: ProcessEnv) -> StageResult:
    SEEN.append(config)
    return StageResult(config.what)


SEEN: list[StageConfig] = []


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put the stages `draw` and `tell-tale` and the configurations in place of the real ones."""
    SEEN.clear()
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name, config, run in (("draw", DrawConfig, _draw), ("tell", TellConfig, _tell)):
        module = types.ModuleType(f"tokscale.stages.{name}", f"`tokscale {name}`: for tests.")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        module.CONFIG, module.run = config, run
        monkeypatch.setitem(sys.modules, module.__name__, module)
    stages = Registry("stage", group="tokscale.stages.of_tests")
    for stage in (
        registry.Stage("draw", "draw", "draw pets"),
        registry.Stage("tell-tale", "tell", "tell tales", positional_key="what", writes_exit_json=False),
        registry.Stage("later", "not_written_yet", "not there"),
    ):
        stages.add(stage.name, stage)
    monkeypatch.setattr(registry, "STAGES", stages)
    monkeypatch.setattr(compose, "package_data_path", lambda name: folder)
    monkeypatch.setattr(words, "package_data_path", lambda name: folder)
