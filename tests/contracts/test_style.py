"""What the tools say: formatting, lint with docstrings, types, and the size of files and functions."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for name in ("tokscale", "launch") for path in (ROOT / name).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def tool(*command: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_format():
    tool("ruff", "format", "--check", ".")


def test_lint_and_docstrings():
    tool("ruff", "check", ".")


def test_types():
    tool("pyright", "--pythonpath", sys.executable)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 400, "a file beyond 400 lines asks for a second look at the cut"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1 - _docstring_lines(node)
            assert lines <= 60, f"{node.name} has {lines} lines beside its docstring"


def test_no_tensor_is_rearranged_but_by_einops_where_shapes_matter():
    banned = {"permute", "transpose", "view", "reshape", "swapaxes"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} .{node.func.attr}()"
        for part in ("nn", "models")
        for path in sorted((ROOT / "tokscale" / part).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in banned
    ]
    assert not found, "use einops.rearrange: " + ", ".join(found)


def test_shape_annotations_are_executable():
    # A postponed annotation is a string, and no shape in it is ever checked.
    assert not [path for path in SOURCES if "from __future__ import annotations" in path.read_text()]


def test_test_files_have_names_of_their_own():
    names = [path.name for path in TESTS if path.name.startswith("test_")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


@pytest.mark.parametrize(
    "script", ["launch/quickstart", "launch/test", "launch/originals", "launch/python.sh", ".ci/run"]
)
def test_shell_programs_parse_and_are_executable(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    assert script.endswith(".sh") or os.access(ROOT / script, os.X_OK)


def test_nothing_unpickles_code():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        # What the test itself has written; what ranks of one job say to each other, as torch.distributed has it.
        if path not in (ROOT / "tokscale/dist/testing.py", ROOT / "tokscale/dist/tree.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
        if "weights_only=True" not in ast.unparse(node)
    ]
    assert not found, found


def test_library_code_draws_from_streams_of_its_own_only():
    streams = ("random.Random", "np.random.default_rng", "np.random.PCG64")  # with a seed; all else is global state
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node.func)}"
        for path in SOURCES
        if path != ROOT / "tokscale/base/rng.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        if ast.unparse(node.func).startswith(("random.", "np.random.", "numpy.random.", "torch.manual_seed"))
        and not (ast.unparse(node.func) in streams and node.args)
        and not ast.unparse(node.func).startswith(tuple(f"{stream}(" for stream in streams))  # of one made in place
    ]
    assert not found, found


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return (first.end_lineno or 0) - first.lineno + 1
    return 0
