"""Models with conditions beside caption ids, through the whole pipeline: train, resume, export, sample, evaluate."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import text_encoders
import tiny_pipeline
import torch
from conditioned_model import toy

from tokscale import load
from tokscale.base.batch import LABELS, TEXT_EMBEDS, TEXT_EMBEDS_MASK
from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError
from tokscale.checkpoint.store import CheckpointStore
from tokscale.dist.env import ProcessEnv
from tokscale.stages import evaluate, export, sample, tokenize, train
from tokscale.stages.embed import invalidate_damaged
from tokscale.train.metrics import read_metrics

ALONE = ProcessEnv()
__all__ = ["toy"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """Tokenizers, a text encoder, and token shards with labels."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline.make_image_tokenizer(folder / "image_tokenizer")
    tiny_pipeline.make_token_shards(folder / "data/tokens", folder / "image_tokenizer", labels=True)
    text_encoders.save_t5(folder / "t5")
    return folder


@pytest.fixture
def trained(pipeline, toy, tmp_path) -> Path:
    train.run(config(pipeline, toy, tmp_path / "run"), ALONE)
    return tmp_path / "run"


def config(pipeline: Path, kind: Any, run_dir: Path, **values: Any) -> train.TrainConfig:
    return decode(
        kind,
        {
            "run_dir": run_dir,
            "data_dir": pipeline / "data",
            "image_tokenizer": pipeline / "image_tokenizer",
            "text_encoder": pipeline / "t5",
            "text_encoder_precision": "fp32",
            "model": {"kind": "toy", "condition": {"kind": "embeddings"}},
            "optim": {"lr": 5e-2},
            "loop": {"total_steps": 30, "log_every": 1},
            "checkpoint": {"every_steps": 10},
            "batch_size": 16,
        }
        | values,
    )


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir)]


@pytest.fixture
def exported(trained) -> Iterator[Path]:
    export.run(export.ExportConfig(run_dir=trained), ALONE)
    yield trained / "export"


def test_a_model_learns_from_the_states_of_a_text_encoder_without_a_text_tokenizer(trained):
    blind = math.log(len(tiny_pipeline.CAPTIONS))  # the codes follow from the captions, and only the states tell them
    assert losses(trained)[-1] < 0.7 * blind


def test_a_run_goes_on_with_the_same_encoder_only(pipeline, toy, trained, tmp_path):
    goes_on = {"loop": {"total_steps": 31, "log_every": 1}}
    shutil.copytree(trained, tmp_path / "copy")
    moved = Path(shutil.copytree(pipeline / "t5", tmp_path / "moved"))
    train.run(config(pipeline, toy, tmp_path / "copy", text_encoder=moved, **goes_on), ALONE)
    assert len(losses(tmp_path / "copy")) == 31
    with pytest.raises(DataError, match="data order has text_encoder="):
        train.run(config(pipeline, toy, trained, text_encoder_length=4, **goes_on), ALONE)


def test_an_interrupted_run_has_the_losses_of_an_undisturbed_one(pipeline, toy, trained, tmp_path, monkeypatch):
    class PowerCutError(Exception):
        pass

    with monkeypatch.context() as patch:
        real = CheckpointStore.poll

        def poll(store: CheckpointStore):
            if len(losses(tmp_path / "again")) == 17:
                raise PowerCutError
            return real(store)

        patch.setattr(CheckpointStore, "poll", poll)
        with pytest.raises(PowerCutError):
            train.run(config(pipeline, toy, tmp_path / "again"), ALONE)
    train.run(config(pipeline, toy, tmp_path / "again"), ALONE)
    assert losses(tmp_path / "again") == losses(trained)


def test_the_width_comes_from_the_encoder_and_without_one_it_says_so(pipeline, toy, tmp_path):
    with pytest.raises(ConfigError, match="give text_encoder=FOLDER"):
        train.run(config(pipeline, toy, tmp_path / "a", text_encoder=None), ALONE)
    wide = {"kind": "toy", "condition": {"kind": "embeddings", "width": 99}}
    with pytest.raises(ConfigError, match=r"model\.condition\.width: got 99, but the text encoder has 16"):
        train.run(config(pipeline, toy, tmp_path / "b", model=wide), ALONE)


def test_an_export_samples_with_the_encoder_it_was_trained_with(pipeline, exported):
    pretrained = load(exported)
    assert pretrained.text_tokenizer is None and pretrained.text_encoder is not None
    captions = ["a small red circle", "a large blue circle"]
    found = pretrained.prompts(captions)
    states, mask = pretrained.text_encoder.encode(captions)
    assert torch.equal(found.extra[TEXT_EMBEDS], states) and torch.equal(found.extra[TEXT_EMBEDS_MASK], mask)
    images = pretrained.sample(captions, seed=1)
    assert images.shape == (2, 3, 8, 8) and not torch.equal(images[0], images[1])
    assert torch.equal(images, load(exported, text_encoder=pipeline / "t5").sample(captions, seed=1))
    again = Path(pretrained.save_pretrained(exported.parent / "saved"))
    assert torch.equal(images, load(again).sample(captions, seed=1))


def test_an_encoder_that_is_gone_or_another_is_refused_naming_it(pipeline, exported, tmp_path):
    moved = pipeline / "t5-moved"
    (pipeline / "t5").rename(moved)
    try:
        with pytest.raises(DataError, match=rf"in {pipeline}/t5, which is not there; give text_encoder=FOLDER"):
            load(exported)
        assert load(exported, text_encoder=moved).text_encoder is not None
        other = text_encoders.save_t5(tmp_path / "other", seed=3)
        with pytest.raises(DataError, match=rf"{other}: is not the text encoder this model was trained with"):
            load(exported, text_encoder=other)
    finally:
        moved.rename(pipeline / "t5")


def test_an_export_may_hold_a_copy_of_the_encoder(pipeline, trained, tmp_path):
    out = tmp_path / "whole"
    export.run(export.ExportConfig(run_dir=trained, out=out, copy_text_encoder=True), ALONE)
    moved = Path(shutil.move(out, tmp_path / "elsewhere"))
    (pipeline / "t5").rename(pipeline / "away")
    try:
        assert load(moved).sample(["a small red circle"]).shape == (1, 3, 8, 8)
    finally:
        (pipeline / "away").rename(pipeline / "t5")


def test_the_stages_sample_and_evaluate_with_it(pipeline, exported, trained):
    words = {"run_dir": trained, "device": "cpu", "text_encoder": pipeline / "t5"}
    result = sample.run(decode(sample.SampleConfig, words | {"prompts": ["a small red circle"]}), ALONE)
    assert result.outputs["grid"].exists()
    evaluate.run(decode(evaluate.EvaluateConfig, words | {"prompts": 4, "images": 8, "batch_size": 4}), ALONE)
    report = evaluate.read_json(trained / "report.json")
    assert report["held_out_losses"]["total"] > 0


def test_a_model_learns_from_classes_and_draws_them(pipeline, toy, tmp_path):
    model = {"kind": "toy", "condition": {"kind": "classes", "num_classes": 8}}
    run_dir = tmp_path / "run"
    train.run(config(pipeline, toy, run_dir, model=model, text_encoder=None), ALONE)
    assert losses(run_dir)[-1] < 0.5 * losses(run_dir)[0]
    export.run(export.ExportConfig(run_dir=run_dir), ALONE)
    pretrained = load(run_dir / "export")
    assert pretrained.prompts(["3", "7"]).extra[LABELS].tolist() == [3, 7]
    assert pretrained.sample(["3", "7"]).shape == (2, 3, 8, 8)
    with pytest.raises(DataError, match="got '8'; this model draws classes, give a number below 8"):
        pretrained.sample(["8"])


def test_classes_that_the_model_does_not_have_are_refused_before_training(pipeline, toy, tmp_path):
    few = {"kind": "toy", "condition": {"kind": "classes", "num_classes": 7}}
    with pytest.raises(ConfigError, match="num_classes=7: labels go to 7"):
        train.run(config(pipeline, toy, tmp_path / "a", model=few), ALONE)
    tiny_pipeline.make_token_shards(tmp_path / "data/tokens", pipeline / "image_tokenizer")
    with pytest.raises(ConfigError, match="no labels; tokenize with labels=true"):
        train.run(config(pipeline, toy, tmp_path / "b", model=few, data_dir=tmp_path / "data"), ALONE)


def embed(pipeline: Path, data_dir: Path, **values: Any) -> Any:
    words = {
        "action": "embed",
        "data_dir": data_dir,
        "run_dir": data_dir / "run",
        "text_encoder": pipeline / "t5",
        "text_encoder_precision": "fp32",
        "work": {"retry_seconds": 0},
        "device": "cpu",
    }
    return tokenize.run(decode(tokenize.TokenizeConfig, words | values), ALONE)


def test_stored_states_train_the_model_that_the_encoder_trains(pipeline, toy, trained, tmp_path, caplog):
    data_dir = Path(shutil.copytree(pipeline / "data", tmp_path / "data"))
    with caplog.at_level("INFO"):
        assert not embed(pipeline, data_dir).skipped
    assert "GB (64 captions of 5.0 tokens on average), " in caplog.text, "the bill comes first"
    assert embed(pipeline, data_dir).skipped
    shard = data_dir / "tokens/embeds/embeds-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    invalidate_damaged(data_dir / "tokens")
    assert not embed(pipeline, data_dir).skipped and embed(pipeline, data_dir).skipped
    stored = {"data_dir": data_dir, "data": {"text_embeds": "stored"}, "text_encoder": None}
    train.run(config(pipeline, toy, tmp_path / "run", **stored), ALONE)
    assert losses(tmp_path / "run") == pytest.approx(losses(trained), rel=1e-4)
    export.run(export.ExportConfig(run_dir=tmp_path / "run"), ALONE)
    assert load(tmp_path / "run/export").sample(["a small red circle"]).shape == (1, 3, 8, 8)
    goes_on = {"loop": {"total_steps": 31, "log_every": 1}, "data_dir": data_dir}
    train.run(config(pipeline, toy, tmp_path / "run", **goes_on), ALONE)  # the encoder instead of its stored states


def test_stored_states_of_another_encoder_are_refused_naming_both(pipeline, toy, tmp_path):
    data_dir = Path(shutil.copytree(pipeline / "data", tmp_path / "data"))
    stored = {"data_dir": data_dir, "data": {"text_embeds": "stored"}}
    with pytest.raises(DataError, match="run `tokscale tokenize action=embed tokens="):
        train.run(config(pipeline, toy, tmp_path / "a", **stored), ALONE)
    embed(pipeline, data_dir)
    other = text_encoders.save_t5(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match=rf"states of the text encoder .*{pipeline}/t5.*this run names"):
        train.run(config(pipeline, toy, tmp_path / "b", text_encoder=other, **stored), ALONE)
    with pytest.raises(DataError, match="set it as it was, or remove the folder"):
        embed(pipeline, data_dir, text_encoder=other)
    with pytest.raises(ConfigError, match="give text_encoder=FOLDER"):
        embed(pipeline, data_dir, text_encoder=None)


def test_maskgit_learns_from_the_states_and_draws_with_them(pipeline, tmp_path):
    model = {"kind": "maskgit", "dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "condition": {"kind": "embeddings"}}
    few = {"loop": {"total_steps": 4, "log_every": 1}, "optim": {"lr": 1e-2}}
    train.run(config(pipeline, train.TrainConfig, tmp_path, model=model, **few), ALONE)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    export.run(export.ExportConfig(run_dir=tmp_path), ALONE)
    pretrained = load(tmp_path / "export")
    assert pretrained.config.condition.width == 16
    assert pretrained.sample(["a small red circle"], seed=1).shape == (1, 3, 8, 8)
