"""One cluster for all tests, and the road that its jobs train on."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_road
import yaml
from local_cluster import LocalCluster, missing

from tokscale.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
FLAGS = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    why = missing()
    if why is not None:
        if os.environ.get("CI") == "true" and os.geteuid() == 0 and Path("/etc/debian_version").exists():
            pytest.fail(why)
        pytest.skip(why)
    # Not below pytest's own folders, whose names are too long for munge's socket.
    folder = Path(tempfile.mkdtemp(prefix="cluster-"))
    folder.chmod(0o755)
    with LocalCluster(folder) as running:
        yield running
    shutil.rmtree(folder)


class Road:
    """Tokenizers, token shards and a recipe, and jobs of the shipped batch files on them."""

    def __init__(self, folder: Path, cluster: LocalCluster, steps: int = 300):
        self.folder, self.cluster, self.steps = folder, cluster, steps
        tiny_road.make_road(folder)
        self.recipe = folder / "recipe.yaml"
        shared = {
            "data_dir": str(folder / "data"),
            "image_tokenizer": str(folder / "image_tokenizer"),
            "text_tokenizer": str(folder / "text_tokenizer"),
        }
        train = {
            "model": tiny_road.MODEL,
            "optim": {"lr": 1e-3},
            "loop": {"total_steps": steps, "log_every": 1},
            "checkpoint": {"every_steps": 50},
            "batch_size": 8,
        }
        self.recipe.write_text(yaml.safe_dump({"shared": shared, "train": train}))

    def submit(self, run_dir: Path, *words: str, nodes: int = 2, flags: tuple[str, ...] = (), **environ: str) -> str:
        """Queue `slurm/train.sbatch` as a user would; the job's id."""
        return self.cluster.submit(
            *FLAGS,
            f"--nodes={nodes}",
            f"--output={run_dir}.log",
            *flags,
            str(ROOT / "slurm/train.sbatch"),
            f"recipe={self.recipe}",
            f"run_dir={run_dir}",
            *words,
            environ={
                "TOKSCALE_SLURM": str(ROOT / "slurm"),
                "TOKSCALE_PYTHON": sys.executable,
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
            }
            | environ,
        )


def log_of(run_dir: Path) -> str:
    path = run_dir.with_name(run_dir.name + ".log")
    return path.read_text() if path.exists() else ""


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir)]


def wait_for(condition: Callable[[], bool], run_dir: Path, seconds: float = 240) -> None:
    """Until it holds; the job's log when it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log_of(run_dir)[-4000:]
        time.sleep(0.05)


def trainers(run_dir: Path) -> list[int]:
    """Processes of the ranks that train in a folder."""
    found = subprocess.run(["pgrep", "-f", f"tokscale train .*run_dir={run_dir}( |$)"], capture_output=True, text=True)
    comm = lambda pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()  # noqa: E731
    return [int(pid) for pid in found.stdout.split() if comm(pid).endswith(Path(sys.executable).name)]


@pytest.fixture(scope="session")
def road(cluster, tmp_path_factory) -> Road:
    return Road(tmp_path_factory.mktemp("road"), cluster)


@pytest.fixture(scope="session")
def undisturbed(road, tmp_path_factory) -> list[float]:
    """Losses of the run on two nodes that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = road.cluster.ended(road.submit(run_dir))
    assert ended["JobState"] == "COMPLETED", log_of(run_dir)
    assert len(losses(run_dir)) == road.steps
    return losses(run_dir)
