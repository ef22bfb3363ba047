"""Images of several shapes on two ranks of ZeRO-3: the shapes, samples and losses of one process; and back on one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import yaml
from tiny_buckets import act, make_pipeline, training

from tokscale.base.config import decode
from tokscale.dist.env import ProcessEnv
from tokscale.stages import train
from tokscale.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 8
MODEL = tiny_pipeline.MODEL | {"rotary_emb": False, "attn_types": ["full", "axial_col"]}


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


def on_two_ranks(keys: dict[str, Any], recipe: Path) -> None:
    recipe.write_text(yaml.safe_dump({"train": keys}))
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node=2"]
    clean = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "launch/train.py", f"recipe={recipe}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | clean, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_of_zero3_train_on_the_shapes_of_one_process_and_one_goes_on_from_them(tmp_path):
    make_pipeline(tmp_path, (30, 20, 13))
    act(tmp_path, streams={})
    common: dict[str, Any] = {"model": MODEL, "optim": {"lr": 1e-2}, "loop": {"total_steps": STEPS, "log_every": 1}}
    common |= {"checkpoint": {"every_steps": STEPS // 2}, "data": {"held_out": {"share": 0.15}}}
    common |= {"held_out": {"every_steps": STEPS}, "samples": {"every_steps": 0}, "micro_batches": 2}
    zero, eager = ({"engine": {"kind": kind, "dtype": "fp32"}} for kind in ("zero", "eager"))
    train.run(decode(train.TrainConfig, training(tmp_path, tmp_path / "one", **common, **eager)), ProcessEnv())
    zero["engine"]["stage"] = 3
    on_two_ranks(training(tmp_path, tmp_path / "two", **common, **zero), tmp_path / "recipe.yaml")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == STEPS and one[-1] < one[0]
    assert two[0] == pytest.approx(one[0], rel=1e-6) and two == pytest.approx(one, rel=1e-5)
    held_out = [read_metrics(tmp_path / name)[-1]["held_out/loss"] for name in ("one", "two")]
    assert held_out[0] > 0 and held_out[1] > 0
    # One process goes on from what two have saved: the same batches, of the same shapes.
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "two", again)
    shutil.rmtree(again / "checkpoints" / f"step_{STEPS:09d}")
    train.run(decode(train.TrainConfig, training(tmp_path, again, **common, **eager)), ProcessEnv())
    assert losses(again)[STEPS // 2 :] == pytest.approx(one[STEPS // 2 :], rel=1e-5)
