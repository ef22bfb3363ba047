"""What an installation holds, and how little it loads."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def modules_after(program: str, cwd: Path | None = None, path: str = "") -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `program`."""
    tail = "; import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    ended = subprocess.run(
        [sys.executable, "-c", program + tail],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
    )
    assert ended.returncode == 0, ended.stderr
    return set(ended.stderr.split())


def test_importing_the_package_loads_nothing_heavy():
    assert not modules_after("import tokscale") & {"torch", "numpy", "pydantic", "hydra", "deepspeed"}


def test_help_is_quick_because_it_loads_neither_torch_nor_hydra():
    loaded = modules_after("from tokscale.cli import main; main(['--help'])")
    assert "tokscale" in loaded and not loaded & {"torch", "numpy", "hydra", "omegaconf", "deepspeed"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The built wheel, unpacked as pip would into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, str(folder), str(ROOT)], check=True, capture_output=True)
    (built,) = folder.glob("tokscale-*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_holds_the_configurations_and_no_tests(wheel):
    shipped = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    packed = wheel / "tokscale/_share/configs"
    assert shipped and shipped == {path.relative_to(packed) for path in packed.rglob("*.yaml")}
    assert (wheel / "tokscale/py.typed").exists() and not (wheel / "tests").exists()


def test_the_command_line_works_from_a_wheel_outside_the_checkout(wheel, tmp_path):
    program = (
        "import tokscale; from pathlib import Path; from tokscale.cli.compose import compose; "
        f"assert Path(tokscale.__file__).is_relative_to({str(wheel)!r}), tokscale.__file__; "
        "from tokscale.stages.registry import find; "
        "assert compose(find('train'), ['engine=zero3'])['engine']['stage'] == 3"
    )
    modules_after(program, cwd=tmp_path, path=str(wheel))
