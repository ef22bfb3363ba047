"""`tests/defects.md` knows every defect that code and tests name, and the tests that it names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = ROOT / "tests" / "defects.md"
ROW = re.compile(r"^\| ([DZ]\d+) \| (.+) \| (.+) \|$", re.MULTILINE)
SOURCES = [
    path
    for folder in ("tokscale", "tests", "launch")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md", ".sh") and path != LIST and "reports" not in path.parts
]


def listed() -> dict[str, str]:
    rows = ROW.findall(LIST.read_text())
    assert len(rows) == len({row[0] for row in rows}) > 50
    return {row[0]: row[2] for row in rows}


def named(text: str) -> set[str]:
    """Ids in comments."""
    return set(re.findall(r"(?<![\w./-])([DZ]\d{1,2})(?![\w.])", text))


def test_every_defect_that_is_named_is_in_the_list():
    known = listed()
    unknown = {f"{path.relative_to(ROOT)}: {found}" for path in SOURCES for found in named(path.read_text()) - {*known}}
    assert not unknown


def test_every_test_of_the_list_exists():
    missing = []
    for defect, where in listed().items():
        tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", where)
        for file, test in tests:
            path = ROOT / file
            if not path.exists() or not re.search(rf"^def {test}\(", path.read_text(), re.MULTILINE):
                missing.append(f"{defect}: {file}::{test}")
        assert tests or len(where) > 20, f"{defect}: neither a test nor a reason"
    assert not missing
