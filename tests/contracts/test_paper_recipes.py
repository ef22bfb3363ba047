"""Recipes of papers: sizes that are published, and a plan in the header that `bench plan` still gives."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from tokscale.base.config import decode
from tokscale.bench import plan
from tokscale.cli.compose import compose
from tokscale.models.registry import build_model
from tokscale.stages import registry
from tokscale.stages.train import TrainConfig

FOLDER = Path(__file__).parents[2] / "configs" / "recipe" / "paper"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
QUICK = ("maskgit_imagenet",)
PUBLISHED = {
    "dalle_12b": 12.09e9,
    "parti_350m": 352e6,
    "parti_750m": 755e6,
    "parti_3b": 3.02e9,
    "parti_20b": 20.4e9,
    "muse_632m": 632e6,
    "muse_3b": 3.22e9,
    "maskgit_imagenet": 169.9e6 + 24 * 4 * 768**2,  # the class is read by attention, which the original has not
    "rq_480m_imagenet": 480e6,
    "rq_821m_imagenet": 821e6,
    "rq_1b_imagenet": 1.388e9,
    "rq_4b_imagenet": 3.822e9,
}
"""As the papers count, with or without embeddings; `test_models_configs.py` counts layers alone, to the digit."""


def header(name: str) -> tuple[list[str], str]:
    """The words of the plan's command, and what it said, on one line."""
    lines = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    at = next(number for number, line in enumerate(lines) if line.startswith("# PLAN"))
    command, said = [lines[at].removeprefix("# PLAN")], []
    for line in lines[at + 1 :]:
        (command if line.startswith("#           ") and not said else said).append(line[1:])
    return shlex.split(" ".join(command)), " ".join(" ".join(said).split())


def planned(words: list[str]) -> plan.PlanBench:
    assert words[:3] == ["tokscale", "bench", "plan"]
    values = compose(registry.STAGES["bench"], words[2:])
    return decode(plan.PlanBench, {key: value for key, value in values.items() if key in plan.PlanBench.model_fields})


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in NAMES]
)
def test_the_plan_in_a_header_is_what_bench_plan_says(name):
    words, said = header(name)
    config = planned(words)
    found = plan.planning(config).header([nodes * config.gpus for nodes in config.nodes])
    assert said == " ".join(" ".join(found).split())


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_that_of_the_recipe(name):
    config = planned(header(name)[0])
    trained = decode(TrainConfig, compose(registry.STAGES["train"], [f"recipe=paper/{name}"]))
    assert config.model == trained.model and config.batch_size == trained.batch_size
    assert config.optim.kind == trained.optim.kind and config.dtype == trained.engine.dtype
    assert config.ema == len(trained.engine.ema)
    fitted = plan.fit(config)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in build_model(fitted).parameters())
    assert weights == pytest.approx(PUBLISHED[name], rel=0.08)
    said = re.search(r"([\d.]+) B parameters, (\d+) tokens a sample", header(name)[1])
    assert said is not None and float(said[1]) == pytest.approx(weights / 1e9, rel=0.005)
    tokens = trained.loop.total_steps * trained.batch_size * int(said[2])
    assert config.tokens == pytest.approx(tokens, rel=1e-3)


def test_there_is_a_recipe_for_each_published_one():
    assert set(NAMES) == set(PUBLISHED)
