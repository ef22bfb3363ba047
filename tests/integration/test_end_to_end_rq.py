"""Several codes a place, from images to images: RQ-VAE, token shards, ZeRO-3 on two ranks, export, samples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokscale
from tokscale import cli
from tokscale.data.tokens.manifest import TokenDataset
from tokscale.tokenizers.image import load_image_tokenizer
from tokscale.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PROMPT = "a small red circle at the top left"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rq") / "run"
    words = ["recipe=debug/rqtransformer", f"run_dir={folder}"]
    few = {
        "prepare": ["source.count=96", "shard_samples=48"],
        "train-tokenizer": ["loop.total_steps=4"],
        "tokenize": [],
    }
    for stage, more in few.items():
        assert cli.main([stage, *words, *more]) == 0
    train = [*words, "engine=zero3", "loop.total_steps=6", "checkpoint.every_steps=3"]
    train += ["data.soft_codes.temperature=0.1"]
    command = ["torchrun", "--nproc-per-node", "2", "--rdzv-endpoint", "localhost:0", "--rdzv-backend", "c10d"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:], "launch/train.py", *train],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert cli.main(["export", *words]) == 0
    assert cli.main(["sample", *words, f"prompts=['{PROMPT}']", "num_images=2"]) == 0
    assert cli.main(["evaluate", *words, "prompts=4", "images=8", "sampling={temperature: [0.5, 1.0]}"]) == 0
    return folder


def test_token_shards_keep_the_levels(pipeline):
    dataset = TokenDataset(pipeline / "data" / "tokens")
    tokenizer = load_image_tokenizer(pipeline / "image_tokenizer")
    assert dataset.code_shape == tokenizer.code_shape == (4, 4, 2)
    codes = torch.from_numpy(dataset.read(0).tensors["codes"].astype("int64"))
    assert codes.shape[1:] == (4, 4, 2) and codes.max() < 32
    assert tokenizer.decode(codes[:2]).shape == (2, 3, 32, 32)


def test_two_ranks_train_with_a_loss_for_each_level(pipeline):
    rows = read_metrics(pipeline)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"loss_level_1", "loss_level_2", "accuracy"} <= rows[-1].keys()


def test_the_export_draws_the_same_image_for_the_same_seed(pipeline):
    model = tokscale.load(pipeline / "export")
    images = [model.sample([PROMPT], seed=3, cond_scale=2.0, filter_thres=0.5) for _ in range(2)]
    assert images[0].shape == (1, 3, 32, 32) and torch.equal(*images)
    assert not torch.equal(images[0], model.sample([PROMPT], seed=4, cond_scale=2.0, filter_thres=0.5))


def test_samples_and_a_report_are_there(pipeline):
    assert len(list((pipeline / "samples").glob("000*.png"))) == 2
    report = json.loads((pipeline / "report.json").read_text())
    assert set(report["held_out_losses"]) == {"total", "codes"} and 0 <= report["reconstruction_accuracy"] <= 1
