"""Every committed program can be read, and what it imports of the package is there: reports are made again by them."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_TOLD = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True
)
SCRIPTS = sorted(filter(None, _TOLD.stdout.decode().split("\0"))) or [
    str(path.relative_to(ROOT))
    for folder in ("tokscale", "launch", "tests")  # no checkout, as where the sources came as an archive
    for path in sorted((ROOT / folder).rglob("*.py"))
]
OUTSIDE = sorted(path for path in SCRIPTS if path.startswith("tests/reports/"))
"""Those that no test runs."""


@cache
def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), path)


def module(name: str) -> str | None:
    """The file of a module of the package, or the folder of one without a file."""
    path = name.replace(".", "/")
    found = [known for known in (f"{path}.py", f"{path}/__init__.py", path) if (ROOT / known).exists()]
    return found[0] if found else None


@cache
def names(path: str) -> frozenset[str]:
    """What a module binds anywhere."""
    found = set()
    for node in ast.walk(parsed(path)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.alias(name=name, asname=other):
                found.add((other or name).split(".")[0])
    return frozenset(found)


def missing(path: str) -> list[str]:
    found = []
    for node in ast.walk(parsed(path)):
        match node:
            case ast.Import(names=aliases):
                asked = [(alias.name, "") for alias in aliases]
            case ast.ImportFrom(module=str(of), names=aliases, level=0):
                asked = [(of, alias.name) for alias in aliases]
            case _:
                continue
        for of, name in asked:
            if of.split(".")[0] != "tokscale":
                continue
            file = module(of)
            inside = file is not None and file.endswith(".py") and name in names(file)
            if file is None or not (name == "" or inside or module(f"{of}.{name}")):
                found.append(f"{path}:{node.lineno} {of} {name}".strip())
    return found


def test_what_programs_import_of_the_package_is_there():
    assert len(SCRIPTS) > 400 and len(OUTSIDE) >= 8
    assert [line for path in SCRIPTS for line in missing(path)] == []


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_reports_program_calls_what_it_imports_with_arguments_that_are_taken(path):
    """Keywords of calls to the package's own functions, as far as they can be read without running."""
    imported = {
        alias.asname or alias.name: node.module
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tokscale.")
        for alias in node.names
    }
    for call in ast.walk(parsed(path)):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in imported):
            continue
        file = module(imported[call.func.id])
        defined = (
            [node for node in parsed(file).body if isinstance(node, ast.FunctionDef) and node.name == call.func.id]
            if file and file.endswith(".py")
            else []
        )
        for function in defined:
            taken = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
            given = {keyword.arg for keyword in call.keywords if keyword.arg}
            assert function.args.kwarg or given <= taken, f"{path}:{call.lineno} {call.func.id}"


def test_reports_name_no_interpreter_of_the_machine_that_made_them():
    found = sorted((ROOT / "tests/reports").rglob("*.json"))
    named = [re.findall(r'"executable": "([^"]*)"', path.read_text()) for path in found]
    assert sum(map(len, named)) > 10
    assert [
        str(path) for path, names in zip(found, named, strict=True) if any(name.startswith("/") for name in names)
    ] == []
