"""An array that tokenizes, one task of which is killed twice: it comes again alone, and nothing is made twice."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pipeline
from slurm_jobs import FLAGS, ROOT, wait_for

from tokscale.cli import main
from tokscale.data.tokens.manifest import TokenDataset

pytestmark = pytest.mark.long


def worker(run_dir: Path, task: int) -> int | None:
    """The process that tokenizes as task number `task`."""
    found = subprocess.run(
        ["pgrep", "-f", f"tokscale tokenize .*run_dir={run_dir}( |$)"], capture_output=True, text=True
    )
    for pid in found.stdout.split():
        try:
            program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if program == sys.executable.encode() and f"SLURM_ARRAY_TASK_ID={task}".encode() in environ:
            return int(pid)
    return None


def test_a_task_that_fails_twice_comes_again_twice(cluster, tmp_path):
    run_dir, data = tmp_path / "run", tmp_path / "data"
    tiny_pipeline.make_image_tokenizer(tmp_path / "image_tokenizer")
    source = "source={kind: shapes, count: 512}"
    assert main(["prepare", f"data_dir={data}", f"run_dir={run_dir}", source, "shard_samples=64"]) == 0
    words = [f"run_dir={run_dir}", f"data_dir={data}", f"image_tokenizer={tmp_path}/image_tokenizer", "unit_samples=64"]
    environ = {
        "TOKSCALE_SLURM": str(ROOT / "slurm"),
        "TOKSCALE_PYTHON": sys.executable,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    output = f"--output={run_dir}.log"
    job = cluster.submit(
        *FLAGS, "--array=0-1", output, str(ROOT / "slurm/tokenize.sbatch"), "action=run", *words, environ=environ
    )
    dead: set[int] = set()
    for _ in range(2):
        wait_for(lambda: worker(run_dir, 1) not in (None, *dead), run_dir)
        victim = worker(run_dir, 1)
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        dead.add(victim)
    first, second = cluster.ended(f"{job}_0"), cluster.ended(f"{job}_1")
    assert (first["JobState"], first["Restarts"]) == ("COMPLETED", "0")
    assert (second["JobState"], second["Restarts"]) == ("COMPLETED", "2")
    assert main(["tokenize", *words]) == 0  # closes it
    assert TokenDataset(data / "tokens").samples == 512
    assert main(["tokenize", "action=verify", *words]) == 0
