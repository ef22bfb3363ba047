"""What is looked at while a model trains changes nothing of the training, and says what it costs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import torch
from PIL import Image

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.checkpoint.reader import Checkpoint
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.dist.testing import run_ranks
from tokscale.models.registry import build_model
from tokscale.stages import train, train_samples
from tokscale.stages.inputs import open_inputs
from tokscale.train.metrics import read_metrics

ALONE = ProcessEnv()
SPLIT = {"held_out": {"share": 0.25}}
LOOKING: dict[str, Any] = {
    "held_out": {"every_steps": 3, "averages": ["ema/0.9"]},
    "samples": {"every_steps": 4, "count": 3, "weights": "ema/0.9"},
    "best": {},
    "profile": {"steps": 2, "skip": 2},
    "diagnostics": {"gradient_norms_every": 2, "attention_entropy_every": 4},
}
BLIND: dict[str, Any] = {"held_out": {"every_steps": 1000}, "samples": {"every_steps": 0}}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline.make_inputs(folder)
    return folder


def config(pipeline: Path, run_dir: Path, **values: Any) -> train.TrainConfig:
    settings = {
        "run_dir": run_dir,
        "data_dir": pipeline / "data",
        "image_tokenizer": pipeline / "image_tokenizer",
        "text_tokenizer": pipeline / "text_tokenizer",
        "model": tiny_pipeline.MODEL | {"attn_dropout": 0.1},
        "engine": {"dtype": "fp32", "ema": [0.9]},
        "optim": {"lr": 1e-2},
        "loop": {"total_steps": 8, "log_every": 1},
        "checkpoint": {"every_steps": 4},
        "batch_size": 8,
        "data": SPLIT,
    }
    return decode(train.TrainConfig, settings | values)


def saved(run_dir: Path, step: int = 8) -> dict[str, torch.Tensor]:
    with Checkpoint(run_dir / f"checkpoints/step_{step:09d}").source("model") as source:
        return {
            f"{name}/{slot}": source.read(name, slot, 0, math.prod(source.shape(name, slot)))
            for name in source.names()
            for slot in source.slots(name)
        }


@pytest.fixture(scope="module")
def looked_at(pipeline, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("looked_at")
    train.run(config(pipeline, run_dir, **LOOKING), ALONE)
    return run_dir


def test_looking_changes_no_bit(pipeline, looked_at, tmp_path):
    train.run(config(pipeline, tmp_path, **BLIND), ALONE)
    seen, blind = read_metrics(looked_at), read_metrics(tmp_path)
    assert [row["loss"] for row in seen] == [row["loss"] for row in blind]
    assert [row["grad_norm"] for row in seen] == [row["grad_norm"] for row in blind]
    mine, other = saved(looked_at), saved(tmp_path)
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def loss_of_checkpoint(run_dir: Path, pipeline: Path) -> float:
    """The loss of the last checkpoint's weights on the held-out samples, by the model alone."""
    inputs = open_inputs(config(pipeline, run_dir), Comm(ALONE))
    model = build_model(inputs.model).eval()
    with torch.no_grad(), Checkpoint(run_dir / "checkpoints/step_000000008").source("model") as source:
        for name, parameter in model.named_parameters():
            parameter.copy_(source.read(name, "weight", 0, parameter.numel()).view_as(parameter))
        (held_out,) = inputs.held_out
        batch = held_out.deliver(held_out.prepare(0, held_out.samples // 8 * 8))
        return torch.stack([model(part).total for part in batch.split(len(batch) // 8)]).mean().item()


def test_the_held_out_loss_is_that_of_the_model_on_samples_that_training_never_sees(looked_at, pipeline):
    rows = {row["step"]: row for row in read_metrics(looked_at)}
    assert [step for step, row in rows.items() if "held_out/loss" in row] == [3, 6, 8]
    assert {"held_out/loss/text", "held_out/loss/image", "held_out/ema/0.9/loss", "held_out/seconds"} <= set(rows[3])
    assert rows[8]["held_out/loss"] < rows[3]["held_out/loss"]
    assert rows[8]["held_out/loss"] == pytest.approx(loss_of_checkpoint(looked_at, pipeline), rel=1e-6)


def test_samples_are_drawn_for_the_same_prompts_and_seeds_each_time(looked_at):
    listed = [json.loads(line) for line in (looked_at / "samples/training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in listed] == [4, 8] and len(listed[0]["prompts"]) == 3
    assert listed[0]["prompts"] == listed[1]["prompts"] and listed[0]["seeds"] == listed[1]["seeds"]
    sheets = [Image.open(looked_at / "samples" / row["file"]) for row in listed]
    assert sheets[0].size == sheets[1].size and sheets[0].tobytes() != sheets[1].tobytes()
    assert all(row["samples/seconds"] > 0 for row in read_metrics(looked_at) if row["step"] in (4, 8))


def test_tensorboard_has_the_samples_and_the_profile_is_written(looked_at):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(looked_at / "tensorboard")).Reload()
    assert board.Tags()["images"] == ["samples"] and len(board.Images("samples")) == 2
    trace = json.loads((looked_at / "profile/rank_0000.json").read_text())
    assert sum(
        event.get("name") == "ProfilerStep" or "aten::addmm" in event.get("name", "") for event in trace["traceEvents"]
    )


def test_the_best_step_is_saved_and_kept(looked_at):
    best = json.loads((looked_at / "checkpoints/best.json").read_text())["best"]
    measured = {row["step"]: row["held_out/loss"] for row in read_metrics(looked_at) if "held_out/loss" in row}
    assert best[-1]["step"] == min(measured, key=measured.__getitem__)
    assert (looked_at / f"checkpoints/step_{best[-1]['step']:09d}").is_dir()


def norms_by_group(row: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix("grad_norm/"): value for name, value in row.items() if name.startswith("grad_norm/")}


def test_gradients_are_told_by_layer_and_make_up_the_whole(looked_at):
    rows = read_metrics(looked_at)
    assert [row["step"] for row in rows if norms_by_group(row)] == [2, 4, 6, 8]
    found = norms_by_group(rows[3])
    assert {"text_emb", "image_head", "stack.layers.0", "stack.layers.1"} <= found.keys() and min(found.values()) > 0
    assert math.sqrt(sum(norm**2 for norm in found.values())) == pytest.approx(rows[3]["grad_norm"], rel=1e-5)


def test_attention_spreads_over_less_than_all_that_it_sees(looked_at):
    rows = {row["step"]: row for row in read_metrics(looked_at)}
    assert [step for step, row in rows.items() if "attention_entropy/seconds" in row] == [4, 8]
    found = {k: v for k, v in rows[4].items() if k.startswith("attention_entropy/") and not k.endswith("seconds")}
    length = 6 + 16  # of caption and codes; a causal query sees between one key and all
    assert len(found) == 2 and all(0 < value < math.log(length) for value in found.values())


def test_entropy_without_held_out_samples_is_refused(pipeline, tmp_path):
    with pytest.raises(ConfigError, match="nothing is held out"):
        train.run(config(pipeline, tmp_path, data={}, diagnostics={"attention_entropy_every": 1}), ALONE)


def test_drawing_that_takes_too_long_is_said_and_left(pipeline, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(train_samples.log, "warning", lambda form, *words: said.append(form % words))
    train.run(config(pipeline, tmp_path, samples={"every_steps": 2, "max_seconds": 1e-9}), ALONE)
    assert ["longer than samples.max_seconds=1e-09" in words for words in said if "samples while" in words] == [True]
    assert not (tmp_path / "samples").exists()


def test_a_run_ends_when_its_patience_is_over_and_is_then_finished(pipeline, tmp_path):
    worse = {"best": {"metric": "loss", "mode": "max", "patience": 3}, "loop": {"total_steps": 40, "log_every": 1}}
    train.run(config(pipeline, tmp_path, **worse), ALONE)
    rows = read_metrics(tmp_path)
    best = max(rows, key=lambda row: row["loss"])["step"]
    assert rows[-1]["step"] == best + 3 < 40
    again = train.run(config(pipeline, tmp_path, **worse), ALONE)
    assert again.skipped and f"at step {best + 3}" in again.summary and read_metrics(tmp_path) == rows
    train.run(config(pipeline, tmp_path, loop={"total_steps": 12, "log_every": 1}), ALONE)  # without it, it goes on
    assert read_metrics(tmp_path)[-1]["step"] == 12


def test_a_run_that_began_before_anything_was_held_out_keeps_its_order(pipeline, tmp_path):
    plain = {"data": {}, "loop": {"total_steps": 8, "log_every": 1}}
    train.run(config(pipeline, tmp_path / "whole", **plain), ALONE)
    train.run(config(pipeline, tmp_path / "cut", **plain | {"loop": {"total_steps": 4, "log_every": 1}}), ALONE)
    train.run(config(pipeline, tmp_path / "cut", loop=plain["loop"], on_change="record"), ALONE)
    cut, whole = (
        [
            shard
            for shard in json.loads(
                next(iter((tmp_path / name).glob("checkpoints/step_000000008/state.json"))).read_text()
            )["loader"]["segments"]
        ]
        for name in ("cut", "whole")
    )
    assert cut == whole and "held_out/loss" not in read_metrics(tmp_path / "cut")[-1]


def rank(comm: Comm, pipeline: Path, run_dir: Path, looking: bool) -> None:
    zero = {"kind": "zero", "stage": 3, "dtype": "fp32", "ema": [0.9]}
    values = (LOOKING if looking else BLIND) | {"engine": zero, "preflight": {"when": "never"}}
    train.run(config(pipeline, run_dir, **values), comm.env)


def test_looking_changes_no_bit_of_two_ranks_under_zero_3(pipeline, tmp_path):
    for looking in (True, False):
        run_ranks(rank, 2, pipeline, tmp_path / str(looking), looking)
    seen, blind = read_metrics(tmp_path / "True"), read_metrics(tmp_path / "False")
    assert [row["loss"] for row in seen] == [row["loss"] for row in blind]
    mine, other = saved(tmp_path / "True"), saved(tmp_path / "False")
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    assert seen[-1]["held_out/loss"] == pytest.approx(loss_of_checkpoint(tmp_path / "True", pipeline), rel=1e-6)
    listed = [json.loads(line) for line in (tmp_path / "True/samples/training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in listed] == [4, 8]
    found = norms_by_group(seen[3])
    assert math.sqrt(sum(norm**2 for norm in found.values())) == pytest.approx(seen[3]["grad_norm"], rel=1e-5)
