"""Parti from images to images: tokenized, trained on two ranks under ZeRO-3, exported and sampled, either kind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tokscale.base.config import decode
from tokscale.cli.compose import compose
from tokscale.dist.env import ProcessEnv
from tokscale.stages import registry
from tokscale.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PLACES = ("data_dir", "image_tokenizer", "text_tokenizer")


def run(stage: str, *words: str) -> None:
    found = registry.find(stage)
    config = decode(registry.import_stage(found).CONFIG, compose(found, ["recipe=debug/parti", *words]))
    registry.import_stage(found).run(config, ProcessEnv())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> list[str]:
    """Images tokenized by the stages; the keys that say where."""
    folder = tmp_path_factory.mktemp("parti")
    for stage, words in {"prepare": ["source.count=64"], "train-tokenizer": [], "tokenize": []}.items():
        run(stage, f"run_dir={folder}", *words)
    return [f"{key}={folder / key.removesuffix('_dir')}" for key in PLACES]


def train(*words: str) -> None:
    variables = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node=2", "--standalone"]
    command = [*launcher, str(ROOT / "launch/train.py"), "recipe=debug/parti", *words]
    ended = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("model", ["parti/debug", "parti/debug_paper"])
def test_images_become_images(tokens, model, tmp_path):
    keys = [f"run_dir={tmp_path}", *tokens]
    train(*keys, f"model={model}", "engine=zero3", "engine.param_persistence_threshold=0")
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert len(losses) == 20 and losses[-1] < 0.9 * losses[0]
    assert json.loads((tmp_path / "env.json").read_text())["world"] == 2
    run("export", *keys)
    run("sample", *keys, "prompts=['a small red circle','a large blue square']", "sampling={cond_scale: 2.0}")
    with Image.open(tmp_path / "samples" / "grid.png") as grid:
        assert grid.size[0] > 64
    assert len(json.loads((tmp_path / "samples" / "samples.json").read_text())["images"]) == 2
