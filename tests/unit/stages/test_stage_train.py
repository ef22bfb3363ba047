"""The train stage on tiny inputs: it learns, resumes, is recognised when done, and refuses what does not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import torch
from stores import web_store

from tokscale.base.config import decode
from tokscale.base.errors import CheckpointError, ConfigError, DataError
from tokscale.checkpoint.store import CheckpointStore
from tokscale.dist.env import ProcessEnv
from tokscale.runs.run_folder import RunConfigMismatchError
from tokscale.stages import export, inputs, train
from tokscale.tokenizers.text import load_text_tokenizer
from tokscale.train.ledger import read_ledger
from tokscale.train.metrics import read_metrics

ALONE = ProcessEnv()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """Tokenizers and token shards."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline.make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def trained(pipeline, tmp_path_factory) -> Path:
    """A run folder after twelve steps in one go."""
    run_dir = tmp_path_factory.mktemp("trained")
    train.run(config(pipeline, run_dir), ALONE)
    return run_dir


def config(pipeline: Path, run_dir: Path, **values: Any) -> train.TrainConfig:
    return decode(
        train.TrainConfig,
        {
            "run_dir": run_dir,
            "data_dir": pipeline / "data",
            "image_tokenizer": pipeline / "image_tokenizer",
            "text_tokenizer": pipeline / "text_tokenizer",
            "model": tiny_pipeline.MODEL,
            "engine": {"dtype": "fp32"},
            "optim": {"lr": 1e-2},
            "loop": {"total_steps": 12, "log_every": 1},
            "checkpoint": {"every_steps": 5},
            "batch_size": 8,
        }
        | values,
    )


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir)]


def test_it_learns_and_says_what_it_made(pipeline, tmp_path, trained):
    result = train.run(config(pipeline, tmp_path), ALONE)
    assert len(losses(tmp_path)) == 12 and losses(tmp_path)[-1] < 0.8 * losses(tmp_path)[0]
    assert losses(tmp_path) == losses(trained)
    assert "dalle at step 12" in result.summary and result.outputs["checkpoints"] == tmp_path / "checkpoints"
    assert result.next_command.startswith(f"tokscale export run_dir={tmp_path} ") and not result.skipped
    assert result.metrics["tokens_per_second"] > 0 and result.metrics["loss"] == losses(tmp_path)[-1]
    assert all(0 < row["goodput"] < 1 for row in read_metrics(tmp_path))
    assert (tmp_path / "config.yaml").exists() and (tmp_path / "logs/rank_0000.log").read_text()


def test_a_run_on_shards_behind_an_address_is_the_same_run_and_resumes(pipeline, tmp_path, trained):
    with web_store(pipeline / "data" / "tokens") as store:
        remote = {"cache": tmp_path / "cache", "retry_seconds": 0}
        data = {"sources": [{"path": store.address}], "remote": remote, "held_out": {"share": 0.0}}
        store.faults += ["", "", "500", "short", "drop"]
        for total in (6, 12):
            values = config(pipeline, tmp_path / "run", data=data).model_dump()
            values["loop"]["total_steps"] = total
            values["schedule"]["kind"] = "constant"
            train.run(decode(train.TrainConfig, values), ALONE)
        assert not store.faults
    constant = config(pipeline, tmp_path / "local", schedule={"kind": "constant"})
    train.run(constant, ALONE)
    assert losses(tmp_path / "run") == losses(tmp_path / "local")


def test_the_record_says_how_attention_is_computed(trained):
    environment = json.loads((trained / "env.json").read_text())
    assert environment["attention"] == {"full": ["sdpa"]} and environment["versions"]["torch"]


def test_an_interrupted_run_has_the_losses_of_an_undisturbed_one(pipeline, tmp_path, trained):
    class PowerCutError(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        real = CheckpointStore.poll

        def poll(store: CheckpointStore):
            if len(losses(tmp_path)) == 8:
                raise PowerCutError
            return real(store)

        patch.setattr(CheckpointStore, "poll", poll)
        with pytest.raises(PowerCutError):
            train.run(config(pipeline, tmp_path), ALONE)
    train.run(config(pipeline, tmp_path, micro_batches=1), ALONE)
    assert losses(tmp_path) == losses(trained)


def test_micro_batches_do_not_change_the_result(pipeline, tmp_path, trained):
    train.run(config(pipeline, tmp_path, micro_batches=4), ALONE)
    assert losses(tmp_path) == pytest.approx(losses(trained), rel=1e-5)


def test_a_finished_run_is_recognised_without_building_anything(pipeline, trained, monkeypatch):
    monkeypatch.setattr(train, "locked_run_dir", None)
    result = train.run(config(pipeline, trained), ALONE)
    assert result.skipped and result.metrics["loss"] == losses(trained)[-1]
    with pytest.raises(RunConfigMismatchError, match=r"optim\.lr is 0.01 there and 0.02 here"):
        train.run(config(pipeline, trained, optim={"lr": 2e-2}), ALONE)


def test_a_schedule_that_is_refused_leaves_the_folder_to_the_corrected_command(pipeline, tmp_path):
    with pytest.raises(ConfigError, match="together exceed the run's"):
        train.run(config(pipeline, tmp_path / "run", schedule={"warmup_steps": 10_000}), ALONE)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("wrong", "fails"),
    [
        ({"seed": 7, "diagnostics": {"attention_entropy_every": 2}, "data": {"held_out": {"share": 0.0}}}, "late"),
        ({"freeze": ["no.such.parameter"]}, "late"),
        ({"init_from": "nowhere"}, "late"),
        ({"optim": {"lr": 0.5}}, "killed"),
        ({"batch_size": 32}, "memory"),
    ],
    ids=["nothing_held_out", "freeze", "init_from", "killed", "memory"],
)
def test_a_start_that_saved_nothing_leaves_the_folder_to_the_corrected_command(
    pipeline, tmp_path, trained, wrong, fails
):
    with pytest.MonkeyPatch.context() as patch:
        if fails != "late":  # after two reported steps, before the first save
            patch.setattr(CheckpointStore, "poll", _failing(tmp_path, fails))
        with pytest.raises((ConfigError, DataError, CheckpointError, MemoryError, KeyboardInterrupt)):
            train.run(config(pipeline, tmp_path, **wrong), ALONE)
    assert (tmp_path / "config.yaml").exists()
    train.run(config(pipeline, tmp_path), ALONE)
    assert losses(tmp_path) == losses(trained)
    assert len(read_ledger(tmp_path)) == len(read_ledger(trained))


def _failing(run_dir: Path, how: str) -> Any:
    real = CheckpointStore.poll

    def poll(store: CheckpointStore):
        if len(losses(run_dir)) == 2:
            raise MemoryError if how == "memory" else KeyboardInterrupt
        return real(store)

    return poll


def test_a_longer_run_goes_on(pipeline, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    longer = {"total_steps": 14, "log_every": 1}
    with pytest.raises(ConfigError, match="on_change=record"):  # the schedule's end moves, and so the learning rate
        train.run(config(pipeline, tmp_path / "run", loop=longer), ALONE)
    train.run(config(pipeline, tmp_path / "run", loop=longer, on_change="record"), ALONE)
    assert len(losses(tmp_path / "run")) == 14


def test_what_was_trained_can_be_exported_and_drawn_from(trained, tmp_path):
    export.run(export.ExportConfig(run_dir=trained, out=tmp_path / "export"), ALONE)
    from tokscale import load

    images = load(tmp_path / "export").sample(["a small red circle", "a large blue circle"], seed=1)
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.uint8


def test_a_batch_that_does_not_divide_is_refused_before_any_rank_is_asked(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "locked_run_dir", None)
    with pytest.raises(ConfigError, match="batch_size=8 does not divide into 3 ranks x micro_batches=2; take a multi"):
        train.run(config(pipeline, tmp_path / "run", micro_batches=2), ProcessEnv(world=3))
    assert not (tmp_path / "run").exists()


def test_token_shards_of_another_tokenizer_are_refused_naming_both(pipeline, tmp_path):
    tiny_pipeline.make_image_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(DataError) as caught:
        train.run(config(pipeline, tmp_path / "run", image_tokenizer=tmp_path / "other"), ALONE)
    from tokscale.tokenizers.image import load_image_tokenizer

    for folder in (pipeline / "image_tokenizer", tmp_path / "other"):
        assert load_image_tokenizer(folder).fingerprint[:12] in str(caught.value)


def test_soft_codes_are_refused_where_no_model_or_no_codes_take_them(pipeline, tmp_path):
    soft = {"data": {"soft_codes": {}}}
    with pytest.raises(ConfigError, match=r"data\.soft_codes: model\.kind=dalle takes no soft targets"):
        train.run(config(pipeline, tmp_path / "dalle", **soft), ALONE)
    places = {"kind": "rqtransformer", "dim": 16, "spatial_layers": 1, "depth_layers": 1, "depth_seq_len": 1}
    with pytest.raises(ConfigError, match="has no residual quantizer"):
        train.run(config(pipeline, tmp_path / "rq", model=places, **soft), ALONE)


def test_missing_token_shards_say_what_to_do(pipeline, tmp_path):
    with pytest.raises(DataError, match="tokenize"):
        train.run(config(pipeline, tmp_path / "run", data_dir=tmp_path), ALONE)


def test_rates_are_medians_peaks_are_peaks_and_the_rest_is_last():
    rows = [
        {"time": 1.0, "loss": 3.0, "tokens_per_second": 10.0, "memory_rss": 5.0, "mfu": None},
        {"time": 2.0, "loss": 2.0, "tokens_per_second": 99.0, "memory_rss": 7.0, "mfu": None},
        {"time": 3.0, "loss": 1.0, "tokens_per_second": 20.0, "memory_rss": 6.0, "mfu": None},
    ]
    assert train.steady_metrics(rows) == {"loss": 1.0, "tokens_per_second": 20.0, "memory_rss": 7.0}


def test_captions_that_are_cut_are_said_before_training_and_kept(pipeline, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(inputs.log, "warning", lambda form, *words: said.append(form % words))
    train.run(
        config(pipeline, tmp_path, model=tiny_pipeline.MODEL | {"text_seq_len": 2}, loop={"total_steps": 1}), ALONE
    )
    found = json.loads((tmp_path / "captions.json").read_text())["model.text_seq_len"]
    text = load_text_tokenizer(pipeline / "text_tokenizer")
    lengths = [len(ids) for ids in text.encode_ragged(tiny_pipeline.CAPTIONS)]
    assert found["captions"] == 64 and found["longest"] == max(lengths) and found["limit"] == 2
    assert found["cut"] == 64 * sum(length > 2 for length in lengths) / len(lengths) > 0
    assert len(said) == 1 and "captions" in said[0] and "model.text_seq_len decides" in said[0]
