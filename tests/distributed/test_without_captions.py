"""Images without captions train MaskGIT, and class folders an RQ-Transformer: on two ranks as in one process."""

from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline

import tokscale
from tokscale.base import rng
from tokscale.base.config import decode
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv, detect
from tokscale.dist.testing import run_ranks
from tokscale.stages import export, train
from tokscale.tokenizers.image import save_image_tokenizer
from tokscale.tokenizers.vqgan.config import VQGANConfig
from tokscale.tokenizers.vqgan.model import VQGAN
from tokscale.train.metrics import read_metrics

SIZES = {"dim": 16, "heads": 2, "dim_head": 8}
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "maskgit": ({"kind": "maskgit", "depth": 2, "condition": {"kind": "none"}, **SIZES}, "an image"),
    "rqtransformer": (
        {
            "kind": "rqtransformer",
            "spatial_layers": 1,
            "depth_layers": 1,
            "condition": {"kind": "classes", "num_classes": len(tiny_pipeline.CAPTIONS)},
            **SIZES,
        },
        "3",
    ),
}
TOKENIZER = {
    "image_size": 8,
    "network": {"kind": "resnet", "dim": 8, "layers": 1, "num_resnet_blocks": 0},
    "quantizer": {"kind": "residual", "num_tokens": 12, "dim": 8, "levels": 2},
}
"""Two codes a place, as an RQ-Transformer reads."""
ENGINES = {"alone": {"kind": "eager", "dtype": "fp32"}, "shared": {"kind": "zero", "stage": 3, "dtype": "fp32"}}


def settings(folder: Path, model: str, name: str) -> train.TrainConfig:
    return decode(
        train.TrainConfig,
        {
            "run_dir": folder / model / name,
            "data_dir": folder / model / "data",
            "image_tokenizer": folder / model / "image_tokenizer",
            "model": MODELS[model][0],
            "engine": ENGINES[name],
            "batch_size": 16,
            "device": "cpu",
            "optim": {"lr": 3e-2},
            "schedule": {"warmup_steps": 0, "kind": "constant"},
            "loop": {"total_steps": 12, "log_every": 1},
            "preflight": {"min_free_gib": 0},
        },
    )


def on_ranks(comm: Comm, folder: Path) -> None:
    del comm
    for model in MODELS:
        train.run(settings(folder, model, "shared"), detect())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tokens with classes and without a text tokenizer for each model, which is trained either way."""
    made = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline.make_image_tokenizer(made / "maskgit" / "image_tokenizer")
    with rng.scope(0, "tokenizer"):
        save_image_tokenizer(VQGAN(decode(VQGANConfig, TOKENIZER)), made / "rqtransformer" / "image_tokenizer")
    for model in MODELS:
        own = made / model
        tiny_pipeline.make_token_shards(own / "data" / "tokens", own / "image_tokenizer", labels=True)
        train.run(settings(made, model, "alone"), ProcessEnv())
    run_ranks(on_ranks, 2, made, fork=True)
    return made


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_learn_what_one_process_learns_and_the_export_draws(folder, model):
    one, two = ([row["loss"] for row in read_metrics(folder / model / name)] for name in ENGINES)
    assert len(one) == len(two) == 12 and one[-1] < 0.9 * one[0]
    assert two[0] == pytest.approx(one[0], rel=1e-6) and two == pytest.approx(one, rel=1e-4)
    own = {"run_dir": folder / model / "shared", "image_tokenizer": folder / model / "image_tokenizer"}
    export.run(decode(export.ExportConfig, own), ProcessEnv())
    pretrained = tokscale.load(folder / model / "shared" / "export")
    assert pretrained.sample([MODELS[model][1]] * 2, seed=1).shape == (2, 3, 8, 8)
