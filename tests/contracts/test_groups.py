"""`launch/test` runs every folder of tests: one that no group names would silently never run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def without_group(script: str, folders: set[str]) -> list[str]:
    """The folders of tests that no group of the script holds."""
    lines = re.findall(r'^group "[^"]+" \S+ (.+)$', script, re.MULTILINE)
    named = [word for line in lines for word in line.split()]
    assert len(named) == len(set(named)) > 4, f"a folder would run twice: {named}"
    return sorted(folder for folder in folders if not any(f"{folder}/".startswith(f"{group}/") for group in named))


@pytest.fixture
def script():
    return (ROOT / "launch" / "test").read_text()


def test_every_folder_that_holds_tests_is_in_one_group(script):
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(folders) > 10 and not without_group(script, folders)


def test_a_new_folder_is_missed(script):
    assert without_group(script, {"tests/unit/base", "tests/unity", "tests/new"}) == ["tests/new", "tests/unity"]
