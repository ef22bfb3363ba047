"""Every file of `configs/` decodes as what it is for, models build, every section of a recipe is a stage's."""

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import torch
from pydantic import BeforeValidator, PlainValidator

import tokscale
from tokscale.base.config import Config, decode
from tokscale.cli.compose import compose, load_file, load_recipe
from tokscale.engine.config import EngineConfig, OptimizerConfig, ScheduleConfig
from tokscale.models.registry import ModelConfig, build_model
from tokscale.stages import registry
from tokscale.tokenizers.image import ImageTokenizerConfig, codec_class
from tokscale.tokenizers.pretrained.torchscript import TorchScriptConfig
from tokscale.tokenizers.text.bpe import BPEConfig

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
    config = decode(GROUPS[group(name)], load_file(CONFIGS, name))
    with pytest.raises(Exception, match="not_a_key"):
        decode(GROUPS[group(name)], load_file(CONFIGS, name) | {"not_a_key": 1})
    assert isinstance(config, Config)


@pytest.mark.parametrize("name", [name for name in FILES if group(name) == "model"])
def test_a_model_builds_on_the_meta_device(name):
    config = decode(ModelConfig, load_file(CONFIGS, name)).fitted(IMAGE, TEXT)
    with torch.device("meta"):
        model = build_model(config)
    assert all(parameter.is_meta for parameter in model.parameters()) and model.train_flops() > 0


@pytest.mark.parametrize("name", [name for name in FILES if group(name) == "tokenizer"])
def test_an_image_tokenizer_builds_on_the_meta_device(name):
    config = decode(GROUPS["tokenizer"], load_file(CONFIGS, name))
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
    decode(registry.import_stage(found).CONFIG, compose(found, [f"recipe={recipe}"]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_only_sections_of_stages_and_says_how_to_run_it(recipe):
    assert not load_recipe(CONFIGS, recipe).keys() - registry.available().keys() - {"shared"}
    first = (CONFIGS / "recipe" / f"{recipe}.yaml").read_text().splitlines()[0]
    assert first.startswith("# COMMAND"), "the first line of a recipe is its command"


@pytest.mark.parametrize("stage", registry.available())
def test_a_stage_offers_a_documented_configuration(stage):
    module = registry.import_stage(registry.find(stage))
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


# --------------------------------------------------------------------------------------------- all configuration


def all_configs() -> list[type[Config]]:
    """Every configuration class of the package, stored records included."""
    for module in pkgutil.walk_packages(tokscale.__path__, "tokscale."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, waiting = [], [Config]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            if kind.__module__.startswith("tokscale."):
                found.append(kind)
    return found


def types(kind: Any, metadata: Sequence[Any] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The plain types of an annotation with what constrains each."""
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        yield from types(inner, (*metadata, *more))
    elif arguments := [part for part in get_args(kind) if part is not ...]:
        if get_origin(kind) is not Literal:
            for part in arguments:
                yield from types(part, metadata if get_origin(kind) in (Union, UnionType) else ())
    else:
        yield kind, tuple(metadata)


def fields() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    for config in all_configs():
        for name, field in config.model_fields.items():
            for kind, metadata in types(field.annotation, field.metadata):
                yield f"{config.__name__}.{name}", kind, metadata


def test_every_key_that_is_a_path_is_of_the_one_type():
    paths = [(name, metadata) for name, kind, metadata in fields() if kind is Path]
    assert len(paths) > 30
    ours = (BeforeValidator, PlainValidator)  # of a path; of a path or an address
    assert not [name for name, metadata in paths if not any(isinstance(m, ours) for m in metadata)]


ANY_NUMBER = {
    "seed": "any integer names a stream",
    "shared_attn_ids": "names",
    "shared_ff_ids": "names",
    "pad_id": "checked against the codes",
    "betas": "checked by a validator that names both",
    "cond_scale_interval": "checked by a validator that names both",
    "temperature_init": "a logarithm",
    "temperature_max": "a logarithm",
    "start": "of an annealing; checked where it is used",
    "end": "of an annealing",
    "temperature": "checked over the whole annealing",
    "kl_div_loss_weight": "checked over the whole annealing",
    "normalization": "means; the deviations are checked",
    "min_scores": "scores may be negative",
    "least": "numbers of metadata may be negative",
    "most": "numbers of metadata may be negative",
    "format": "checked by value",
    "created": "a time",
    "drops": "counts by reason",
    "noted": "counts by reason",
    "status_dict": "counts by reason",
    "index": "of a rejected sample",
    "count": "of written samples",
    "successes": "of written samples",
    "bytes": "of a shard's statistics",
}
"""Keys that any finite number may be given to, and why."""


def test_every_key_that_is_a_number_says_its_range():
    free = {name for name, kind, metadata in fields() if kind in (int, float) and not metadata}
    assert not sorted(name for name in free if name.partition(".")[2] not in ANY_NUMBER)


TRAINED_FOR_TESTS = [
    (recipe, stage) for recipe, stage in sections() if recipe.startswith("debug/") and stage.startswith("train")
]


@pytest.mark.parametrize(("recipe", "stage"), TRAINED_FOR_TESTS)
def test_a_debug_recipe_states_the_precision_it_trains_in(recipe, stage):
    # Stored losses are those of fp32; `auto` would be bf16 on a machine that has it.
    assert load_recipe(CONFIGS, recipe)[stage]["engine"]["dtype"] == "fp32"
