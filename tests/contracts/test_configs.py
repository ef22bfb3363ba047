"""Every file of `configs/` decodes as what it is for, models build, every section of a recipe is a stage's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tokscale.base.config import Config, decode
from tokscale.cli.compose import compose, load, load_recipe
from tokscale.engine.config import EngineConfig, OptimizerConfig, ScheduleConfig
from tokscale.models.registry import ModelConfig, build_model
from tokscale.stages import registry
from tokscale.stages.train_tokenizer import BPEConfig
from tokscale.tokenizers.image import ImageTokenizerConfig, codec_class
from tokscale.tokenizers.pretrained.torchscript import TorchScriptConfig

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
RECIPES = [name.removeprefix("recipe/") for name in FILES if name.startswith("recipe/")]
GROUPS: dict[str, Any] = {
    "engine": EngineConfig,
    "model": ModelConfig,
    "optim": OptimizerConfig,
    "schedule": ScheduleConfig,
    "tokenizer": ImageTokenizerConfig | BPEConfig,
}
IMAGE = SimpleNamespace(num_tokens=512, image_size=64, channels=3, code_shape=(8, 8), fingerprint="f" * 64)
TEXT = SimpleNamespace(num_tokens=1000, fingerprint="t" * 64)


def group(name: str) -> str:
    return name.partition("/")[0]


def test_every_file_is_known():
    unknown = [name for name in FILES if "/" in name and group(name) not in {*GROUPS, "recipe", "cluster"}]
    stages = [name for name in FILES if "/" not in name and name not in registry.STAGES]
    assert not unknown and not stages


@pytest.mark.parametrize("name", [name for name in FILES if group(name) in GROUPS])
def test_a_group_file_decodes_strictly(name):
    config = decode(GROUPS[group(name)], load(CONFIGS, name))
    with pytest.raises(Exception, match="not_a_key"):
        decode(GROUPS[group(name)], load(CONFIGS, name) | {"not_a_key": 1})
    assert isinstance(config, Config)


@pytest.mark.parametrize("name", [name for name in FILES if group(name) == "model"])
def test_a_model_builds_on_the_meta_device(name):
    config = decode(ModelConfig, load(CONFIGS, name)).fitted(IMAGE, TEXT)
    with torch.device("meta"):
        model = build_model(config)
    assert all(parameter.is_meta for parameter in model.parameters()) and model.train_flops() > 0


@pytest.mark.parametrize("name", [name for name in FILES if group(name) == "tokenizer"])
def test_an_image_tokenizer_builds_on_the_meta_device(name):
    config = decode(GROUPS["tokenizer"], load(CONFIGS, name))
    if isinstance(config, BPEConfig | TorchScriptConfig):
        return  # no network, or one that comes as a program
    with torch.device("meta"):
        codec = codec_class(config)(config)
    assert sum(parameter.numel() for parameter in codec.parameters()) > 0


def sections() -> list[tuple[str, str]]:
    return [
        (recipe, stage)
        for recipe in RECIPES
        for stage in load_recipe(CONFIGS, recipe)
        if stage != "shared" and stage in registry.STAGES
    ]


@pytest.mark.parametrize(("recipe", "stage"), sections())
def test_a_section_decodes_as_its_stages_configuration(recipe, stage):
    found = registry.find(stage)
    decode(registry.load(found).CONFIG, compose(found, [f"recipe={recipe}"]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_only_sections_of_stages_and_says_how_to_run_it(recipe):
    assert not load_recipe(CONFIGS, recipe).keys() - registry.available().keys() - {"shared"}
    first = (CONFIGS / "recipe" / f"{recipe}.yaml").read_text().splitlines()[0]
    assert first.startswith("# COMMAND"), "the first line of a recipe is its command"


@pytest.mark.parametrize("stage", registry.available())
def test_a_stage_offers_a_documented_configuration(stage):
    module = registry.load(registry.find(stage))
    assert module.__doc__ and callable(module.run)
    undocumented = list(_undocumented(module.CONFIG, set()))
    assert not undocumented, f"a docstring under each field: {undocumented}"


def _undocumented(config: type[Config], seen: set[type]) -> list[str]:
    if config in seen:
        return []
    seen.add(config)
    found = [
        f"{config.__name__}.{name}"
        for name, field in config.model_fields.items()
        if not field.description and name != "kind"
    ]
    for field in config.model_fields.values():
        for part in _configs(field.annotation):
            found += _undocumented(part, seen)
    return found


def _configs(kind: Any) -> list[type[Config]]:
    if isinstance(kind, type) and issubclass(kind, Config):
        return [kind]
    return [part for argument in getattr(kind, "__args__", ()) for part in _configs(argument)]
