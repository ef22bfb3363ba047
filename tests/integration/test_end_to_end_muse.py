"""Muse from images to images: two resolutions of one tokenization, ZeRO-3, two exports that sample as one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tokscale.base import rng
from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.dist.testing import run_ranks
from tokscale.inference.cascade import Cascade
from tokscale.inference.pretrained import load_pretrained
from tokscale.stages import export, prepare, sample, tokenize, train
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.dvae.model import DiscreteVAE
from tokscale.tokenizers.image import save_image_tokenizer
from tokscale.tokenizers.text import train_bpe
from tokscale.train.metrics import read_metrics

ALONE = ProcessEnv()
PROMPTS = ("a small red circle at the top left", "a large blue square at the centre")
SMALL = {"kind": "maskgit", "dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "text_seq_len": 12}
CAPTION = {"condition": {"kind": "caption", "depth": 1, "heads": 2, "dim_head": 8}}
MODELS: dict[str, dict[str, Any]] = {
    "base": {"self_token_critic": True, "self_cond": True},
    "superres": {
        "token_critic": {"dim": 8, "depth": 1, "heads": 1, "dim_head": 8},
        "lowres": {"layout": "encoder", "depth": 1},
    },
}


STREAM = {"base": "codes.low", "superres": "codes"}


def keys(folder: Path, name: str) -> dict[str, Any]:
    return {
        "run_dir": folder / name,
        "data_dir": folder / "data",
        "image_tokenizer": folder / ("fine" if name == "superres" else "low"),
        "text_tokenizer": folder / "text",
    }


def both(comm: Comm, folder: Path) -> None:
    for name, options in MODELS.items():
        values = {
            "model": SMALL | CAPTION | options,
            "data": {"codes": STREAM[name]},
            "engine": {"kind": "zero", "stage": 3, "param_persistence_threshold": 0},
            "optim": {"lr": 1e-2},
            "loop": {"total_steps": 10, "log_every": 1},
            "batch_size": 16,
        }
        train.run(decode(train.TrainConfig, keys(folder, name) | values), comm.env)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("muse")
    source = {"kind": "shapes", "count": 96}
    prepare.run(decode(prepare.CONFIG, {"data_dir": folder / "data", "source": source}), ALONE)
    for name, size, layers in (("fine", 32, 2), ("low", 16, 2)):
        config = DiscreteVAEConfig(image_size=size, num_tokens=16, codebook_dim=4, num_layers=layers, hidden_dim=4)
        with rng.scope(0, name):
            save_image_tokenizer(DiscreteVAE(config), folder / name)
    train_bpe(list(PROMPTS), 300, folder / "text")
    how = {"work": {"decode_threads": 1}, "text": {"ids": False}, "device": "cpu", "streams": {"low": folder / "low"}}
    tokenize.run(decode(tokenize.CONFIG, keys(folder, "superres") | how), ALONE)
    run_ranks(both, 2, folder)
    for name in MODELS:
        export.run(decode(export.CONFIG, keys(folder, name)), ALONE)
    return folder


def cascade(pipeline: Path, **sampling: Any) -> Cascade:
    return Cascade(
        load_pretrained(pipeline / "base" / "export"), load_pretrained(pipeline / "superres" / "export"), sampling
    )


def test_both_models_and_their_critics_learn(pipeline):
    for name in MODELS:
        rows = read_metrics(pipeline / name)
        assert rows[-1]["loss/generator"] < 0.95 * rows[0]["loss/generator"], name
        assert {"loss/critic", "critic_accuracy"} <= rows[-1].keys()


def test_two_exports_sample_as_one(pipeline):
    values = {
        "export": pipeline / "base" / "export",
        "superres": pipeline / "superres" / "export",
        "superres_sampling": {"timesteps": 2},
        "sampling": {"timesteps": 3, "negative_prompt": "a small red circle"},
        "out": pipeline / "samples",
        "prompts": PROMPTS,
        "device": "cpu",
    }
    config = decode(sample.CONFIG, values)
    assert "2 images" in sample.run(config, ALONE).summary
    images = [Image.open(path) for path in sorted((pipeline / "samples").glob("000*.png"))]
    assert [image.size for image in images] == [(32, 32), (32, 32)]
    assert sample.run(config, ALONE).skipped
    other = config.model_copy(update={"superres_sampling": {"timesteps": 4}})
    assert not sample.run(other, ALONE).skipped


def test_both_resolutions_come_back_and_follow_their_seeds(pipeline):
    muse = cascade(pipeline, timesteps=2)
    fine, low = muse.sample_both(PROMPTS, seeds=[1, 2], timesteps=3)
    assert fine.shape == (2, 3, 32, 32) and low.shape == (2, 3, 16, 16)
    assert torch.equal(low, muse.base.sample(PROMPTS, seeds=[1, 2], timesteps=3))
    assert torch.equal(fine[1:], muse.sample(PROMPTS[1:], seeds=[2], timesteps=3))
    assert not torch.equal(fine, muse.sample(PROMPTS, seeds=[3, 4], timesteps=3))


def test_exports_that_do_not_belong_together_are_refused(pipeline):
    base, superres = load_pretrained(pipeline / "base" / "export"), load_pretrained(pipeline / "superres" / "export")
    with pytest.raises(ConfigError, match="reads no low-resolution codes"):
        Cascade(base, base, {})
    assert superres.config.lowres.fingerprint == base.image_tokenizer.fingerprint
    base.image_tokenizer.fingerprint = "0" * 64
    with pytest.raises(DataError, match="000000000000"):
        Cascade(base, superres, {})


def test_a_super_resolution_run_on_other_data_names_the_stream(pipeline, tmp_path):
    fine = keys(pipeline, "superres") | {"raw": pipeline / "data" / "raw", "data_dir": tmp_path}
    tokenize.run(decode(tokenize.CONFIG, fine | {"text": {"ids": False}, "device": "cpu"}), ALONE)
    values = fine | {"run_dir": tmp_path, "model": SMALL | CAPTION | {"lowres": {}}, "batch_size": 16}
    del values["raw"]
    with pytest.raises(DataError, match=r"codes\.low"):
        train.run(decode(train.TrainConfig, values), ALONE)


def test_a_run_on_the_wrong_stream_is_refused(pipeline, tmp_path):
    values = {"run_dir": tmp_path, "model": SMALL | CAPTION, "batch_size": 16}
    with pytest.raises(DataError, match="codes holds ids of the image tokenizer"):
        train.run(decode(train.TrainConfig, keys(pipeline, "base") | values), ALONE)
    values |= {"run_dir": tmp_path / "superres", "model": SMALL | CAPTION | {"lowres": {}}}
    values |= {"data": {"codes": "codes.low"}}
    with pytest.raises(ConfigError, match=r"data\.codes=codes\.low"):
        train.run(decode(train.TrainConfig, keys(pipeline, "base") | values), ALONE)
