"""What a model has to bring along. The models are found by themselves: a new one without its parts fails here."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from tokscale.base.config import decode, kind_of
from tokscale.cli.compose import compose
from tokscale.models.model import GenerativeModel
from tokscale.models.registry import MODELS
from tokscale.nn.attention.pattern import KINDS
from tokscale.stages import registry

ROOT = Path(__file__).parents[2]
OURS = {name: model for name, model in MODELS.usable().items() if model.__module__.startswith("tokscale.")}
FOLDERS = {name: model.__module__.split(".")[2] for name, model in OURS.items()}
"""A folder below `tokscale/models` may hold several models of one family, which share pages, tests and recipes."""
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def readme(name: str) -> str:
    return (ROOT / "tokscale" / "models" / FOLDERS[name] / "README.md").read_text()


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def debug_kinds() -> dict[str, str]:
    """The folder of the model that each debug recipe trains, by the recipe's name."""
    found = {}
    for file in sorted((ROOT / "configs" / "recipe" / "debug").glob("*.yaml")):
        stage = registry.find("train")
        values = compose(stage, [f"recipe=debug/{file.stem}"])
        if "model" in values:
            found[file.stem] = FOLDERS[kind_of(decode(registry.import_stage(stage).CONFIG, values).model)]
    return found


def test_every_folder_of_models_is_in_the_registry():
    folders = {path.parent.name for path in (ROOT / "tokscale" / "models").glob("*/model.py")}
    assert folders == set(FOLDERS.values())
    packages = [importlib.import_module(f"tokscale.models.{folder}") for folder in folders]
    named = {value for package in packages for value in vars(package).values() if isinstance(value, type)}
    assert set(OURS.values()) <= named


@pytest.mark.parametrize("name", OURS)
def test_a_models_page_says_for_each_option_which_test_holds_it(name):
    rows = [line for line in readme(name).splitlines() if line.startswith("|") and REFERENCE.search(line)]
    assert len(rows) >= 5, "a table of options, each with the test that holds it"
    for path, test in (match.groups() for row in rows for match in REFERENCE.finditer(row)):
        assert (ROOT / path).is_file(), path
        assert test is None or test in functions_of(ROOT / path), f"{path}::{test}"


@pytest.mark.parametrize("name", OURS)
def test_a_models_page_names_every_option_it_has(name):
    tested = "\n".join(line for line in readme(name).splitlines() if line.startswith("|") and REFERENCE.search(line))
    options = set(OURS[name].config_class.model_fields) - {"kind"}
    assert sorted(option for option in options if not re.search(rf"\b{option}\b", tested)) == []
    drawn = getattr(OURS[name], "sampling_config", None)
    ways = set(drawn.model_fields) if drawn else set()
    assert sorted(option for option in ways if not re.search(rf"\b{option}\b", readme(name))) == []


@pytest.mark.parametrize("name", OURS)
def test_a_model_is_held_to_an_oracle(name):
    named = [f"{path}::{test}" for path, test in REFERENCE.findall(readme(name))]
    assert [test for test in named if re.search("parity|oracle|equal_the_original|equals_the_original", test)], (
        "the page names no test that holds the model to its original or to a slow oracle"
    )


@pytest.mark.parametrize("name", [name for name, model in OURS.items() if issubclass(model, GenerativeModel)])
def test_a_model_that_draws_has_a_test_of_sampling(name):
    path = ROOT / "tests" / "unit" / "models" / f"test_{FOLDERS[name]}_sampling.py"
    assert path.is_file() and any(test.startswith("test_") for test in functions_of(path))


def test_every_model_has_a_debug_recipe_and_stored_losses_of_it():
    kinds = debug_kinds()
    assert set(kinds.values()) == set(FOLDERS.values())
    for recipe, folder in kinds.items():
        stored = ROOT / "tests" / "assets" / "losses" / f"debug-{recipe}-train.json"
        assert stored.is_file(), f"{folder}: python tests/contracts/test_losses.py --add debug/{recipe}/train"


@pytest.mark.parametrize("page", ["README.md", "tokscale/models/dalle/README.md"])
def test_pages_that_list_attention_kinds_list_all(page):
    text = (ROOT / page).read_text()
    assert [kind for kind in KINDS if not re.search(rf"[`\s]{kind}\b", text)] == []
