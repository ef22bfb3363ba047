"""Jobs of the shipped batch files on inputs made in a second, and what the tests look at while they run."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tiny_pipeline
import yaml
from local_cluster import LocalCluster

from tokscale.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
FLAGS = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


class SlurmPipeline:
    """Tokenizers, token shards and a recipe, and jobs of the shipped batch files on them."""

    def __init__(self, folder: Path, cluster: LocalCluster, steps: int = 300):
        self.folder, self.cluster, self.steps = folder, cluster, steps
        tiny_pipeline.make_inputs(folder)
        self.recipe = folder / "recipe.yaml"
        shared = {
            "data_dir": str(folder / "data"),
            "image_tokenizer": str(folder / "image_tokenizer"),
            "text_tokenizer": str(folder / "text_tokenizer"),
        }
        train = {
            "model": tiny_pipeline.MODEL,
            "engine": {"kind": "eager", "dtype": "fp32"},  # other numbers of ranks agree to 1e-6 in that alone
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
                "TOKSCALE_STATE": f"{run_dir}.state",
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


def wait_for(condition: Callable[[], bool], run_dir: Path, seconds: float = 600) -> None:
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
