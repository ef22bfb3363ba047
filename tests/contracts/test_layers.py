"""The layers of the house, as import-linter sees them."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=300
    )


def test_imports_go_one_way():
    answer = lint(ROOT)
    assert answer.returncode == 0, answer.stdout
    assert "5 kept, 0 broken" in answer.stdout, "a contract of pyproject.toml is gone"


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("tokscale/nn/planted.py", "def f():\n    import tokscale.dist.comm\n", "Layers go one way"),
        ("tokscale/models/planted.py", "import tokscale.engine.build\n", "Layers go one way"),
        ("tokscale/runs/planted.py", "import tokscale.inference.loading\n", "Layers go one way"),
        ("tokscale/evaluation/planted.py", "import tokscale.train.loop\n", "Layers go one way"),
        ("tokscale/inference/planted.py", "import tokscale.engine.build\n", "Sampling needs no trainer"),
        ("tokscale/data/planted.py", "import omegaconf\n", "Hydra and OmegaConf only in cli"),
        ("tokscale/checkpoint/planted.py", "import deepspeed\n", "DeepSpeed only in engine"),
        ("tokscale/stages/planted.py", "import webdataset\n", "webdataset only in data"),
    ],
)
def test_a_planted_import_is_caught(tmp_path, file, line, broken):
    for name in ("tokscale", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / file).write_text(line)
    answer = lint(tmp_path)
    assert answer.returncode != 0 and f"{broken} BROKEN" in answer.stdout, answer.stdout


def test_no_program_hides_a_module():
    # The folder of a started file comes first on sys.path, so `launch/tokenize.py` would hide the standard tokenize.
    names = {path.stem for path in (ROOT / "launch").glob("*.py")}
    outside = [path for path in sys.path if Path(path or ".").resolve() != ROOT / "launch"]
    finder = importlib.util.find_spec
    assert names and not {name for name in names if name in sys.stdlib_module_names}
    assert outside and not {name for name in names if finder(name) is not None}
