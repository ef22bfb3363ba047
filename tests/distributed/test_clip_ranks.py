"""CLIP on two ranks of ZeRO-3 has the negatives of both: its losses are those of one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pairs
import yaml

from tokscale.base.config import decode
from tokscale.dist.env import ProcessEnv
from tokscale.stages import train
from tokscale.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def test_two_ranks_of_zero3_equal_one_process(tmp_path):
    tiny_pairs.make_pairs(tmp_path)
    alone = tiny_pairs.keys(tmp_path, tmp_path / "alone") | {"engine": {"kind": "eager", "dtype": "fp32"}}
    train.run(decode(train.TrainConfig, alone), ProcessEnv())
    recipe = tmp_path / "recipe.yaml"
    sharded = tiny_pairs.keys(tmp_path, tmp_path / "zero3") | {"engine": {"kind": "zero", "stage": 3, "dtype": "fp32"}}
    recipe.write_text(yaml.safe_dump({"train": sharded}))
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node=2", "--master-port=0"]
    clean = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "launch/train.py", f"recipe={recipe}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | clean, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("alone", "zero3"))
    assert len(one) == 30 and one[-1] < 0.5 * one[0]
    assert two[0] == pytest.approx(one[0], rel=1e-6) and two == pytest.approx(one, rel=1e-4)
