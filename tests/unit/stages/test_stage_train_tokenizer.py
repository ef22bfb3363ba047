"""The train-tokenizer stage on a few drawn pictures: both tokenizers come out, whole, and only once."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError
from tokscale.checkpoint.store import CheckpointStore
from tokscale.dist.env import ProcessEnv
from tokscale.dist.slurm import NodesRefusedError
from tokscale.stages import prepare, train_tokenizer
from tokscale.stages.run_folder import AnotherRunError
from tokscale.tokenizers.image import load_image_tokenizer
from tokscale.tokenizers.text import load_text_tokenizer
from tokscale.train.metrics import read_metrics
from tokscale.train.watchdog import FOLDER as HEARTBEATS
from tokscale.train.watchdog import read_heartbeats

ALONE = ProcessEnv()
TINY = {"kind": "dvae", "image_size": 16, "num_layers": 2, "num_tokens": 16, "codebook_dim": 8, "hidden_dim": 8}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    values = {"data_dir": folder, "source": {"kind": "shapes", "count": 48}, "shard_samples": 24, "preview": 0}
    prepare.run(decode(prepare.PrepareConfig, values), ALONE)
    return folder


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory) -> Path:
    """A run folder after twelve steps in one go."""
    run_dir = tmp_path_factory.mktemp("trained")
    train_tokenizer.run(config(data_dir, run_dir), ALONE)
    return run_dir


def config(data_dir: Path, run_dir: Path, **values: Any) -> train_tokenizer.TrainTokenizerConfig:
    return decode(
        train_tokenizer.TrainTokenizerConfig,
        {
            "run_dir": run_dir,
            "data_dir": data_dir,
            "tokenizer": TINY,
            "text": {"vocab_size": 290},
            "optim": {"lr": 1e-2, "weight_decay": 0.0},
            "loop": {"total_steps": 12, "log_every": 1},
            "checkpoint": {"every_steps": 5},
            "batch_size": 8,
        }
        | values,
    )


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / train_tokenizer.FOLDER)]


def test_both_tokenizers_come_out(data_dir, tmp_path, trained):
    result = train_tokenizer.run(config(data_dir, tmp_path), ALONE)
    assert losses(tmp_path) == losses(trained) and losses(tmp_path)[-1] < 0.8 * losses(tmp_path)[0]
    image, text = load_image_tokenizer(tmp_path / "image_tokenizer"), load_text_tokenizer(tmp_path / "text_tokenizer")
    assert image.num_tokens == 16 and image.code_shape == (4, 4) and 257 < text.num_tokens <= 290
    assert image.fingerprint == load_image_tokenizer(trained / "image_tokenizer").fingerprint
    assert result.outputs["image_tokenizer"] == tmp_path / "image_tokenizer"
    assert result.figures["codes_used"] >= 1 and result.figures["images_per_second"] > 0
    assert "codebook_perplexity" in read_metrics(tmp_path / train_tokenizer.FOLDER)[-1]
    assert (tmp_path / train_tokenizer.FOLDER / "samples/reconstructions.png").exists()
    assert result.next_command.startswith("tokscale tokenize ")


def test_what_was_trained_is_what_comes_out(data_dir, trained):
    image = load_image_tokenizer(trained / "image_tokenizer")
    store = trained / train_tokenizer.FOLDER / "checkpoints" / "step_000000012"
    from tokscale.checkpoint.reader import Checkpoint

    with Checkpoint(store).source("tokenizer") as source:
        for name, parameter in image.codec.named_parameters():
            assert torch.equal(source.read(name, "weight", 0, parameter.numel()), parameter.flatten()), name


def test_an_interrupted_run_goes_on_to_the_same_tokenizer(data_dir, tmp_path, trained):
    class PowerCutError(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        real = CheckpointStore.poll

        def poll(store: CheckpointStore):
            if len(losses(tmp_path)) == 7:
                raise PowerCutError
            return real(store)

        patch.setattr(CheckpointStore, "poll", poll)
        with pytest.raises(PowerCutError):
            train_tokenizer.run(config(data_dir, tmp_path), ALONE)
    assert not (tmp_path / "image_tokenizer").exists()
    train_tokenizer.run(config(data_dir, tmp_path), ALONE)
    fingerprints = {load_image_tokenizer(folder / "image_tokenizer").fingerprint for folder in (tmp_path, trained)}
    assert len(fingerprints) == 1


def test_what_is_done_is_recognised_and_what_is_missing_is_made(data_dir, trained, tmp_path, monkeypatch):
    (trained / "text_tokenizer/config.json").unlink()
    assert not train_tokenizer.run(config(data_dir, trained), ALONE).skipped
    assert (trained / "text_tokenizer/config.json").exists() and len(losses(trained)) == 12
    monkeypatch.setattr(train_tokenizer, "Comm", None)
    assert train_tokenizer.run(config(data_dir, trained), ALONE).skipped
    with pytest.raises(AnotherRunError, match=r"tokenizer\.hidden_dim is 8 there and 9 here"):
        train_tokenizer.run(config(data_dir, trained, tokenizer=TINY | {"hidden_dim": 9}), ALONE)


def test_a_text_tokenizer_alone(data_dir, tmp_path):
    result = train_tokenizer.run(config(data_dir, tmp_path, tokenizer={"kind": "bpe", "vocab_size": 280}), ALONE)
    assert load_text_tokenizer(tmp_path / "text_tokenizer").num_tokens <= 280
    assert not (tmp_path / "image_tokenizer").exists() and "text ids" in result.summary


def test_bad_arithmetic_and_missing_pictures_are_refused(data_dir, tmp_path):
    with pytest.raises(ConfigError, match="does not divide into 3 ranks"):
        train_tokenizer.run(config(data_dir, tmp_path / "a"), ProcessEnv(world=3))
    with pytest.raises(DataError, match="nothing-here"):
        train_tokenizer.run(config(tmp_path / "nothing-here", tmp_path / "b"), ALONE)


def test_the_machines_are_looked_at_first_and_watched_meanwhile(data_dir, tmp_path):
    full = {"when": "always", "min_free_gib": 1e9}
    with pytest.raises(NodesRefusedError, match=r"GiB are free, preflight\.min_free_gib"):
        train_tokenizer.run(config(data_dir, tmp_path / "full", preflight=full), ALONE)
    assert not read_metrics(tmp_path / "full" / train_tokenizer.FOLDER)
    train_tokenizer.run(config(data_dir, tmp_path / "run", loop={"total_steps": 1}), ALONE)
    (beat,) = read_heartbeats(tmp_path / "run" / train_tokenizer.FOLDER / HEARTBEATS, 1)
    assert beat is not None and beat.pid == os.getpid()
