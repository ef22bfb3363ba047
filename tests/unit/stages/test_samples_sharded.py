"""Samples that are drawn from weights which no rank holds whole: the same images, and the same training."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import torch
from test_monitoring import ALONE, config, saved

from tokscale.base.errors import ConfigError, DataError
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.common import CommonEngine
from tokscale.stages import train, train_samples
from tokscale.train.metrics import read_metrics

CAPTION = {"kind": "caption", "depth": 1, "heads": 1, "dim_head": 8}
MASKGIT = {"kind": "maskgit", "dim": 8, "depth": 1, "heads": 1, "dim_head": 8, "text_seq_len": 6, "condition": CAPTION}
ZERO = {"kind": "zero", "stage": 3, "dtype": "fp32", "ema": [0.9], "param_persistence_threshold": 0}
SHORT = {"loop": {"total_steps": 4, "log_every": 1}, "model": MASKGIT}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline.make_inputs(folder)
    return folder


def drawing(**samples: Any) -> dict[str, Any]:
    """Options of `samples` beside those that all have."""
    return SHORT | {"samples": {"every_steps": 2, "weights": "ema/0.9"} | samples}


def every_way(comm: Comm, pipeline: Path, folder: Path) -> str:
    """Train in each way, with one image for two ranks; then where the second rank cannot read what to draw."""
    ways = {"blind": SHORT | {"samples": {"every_steps": 0}}}
    ways |= {gather: drawing(count=1, gather=gather, sampling={"timesteps": 3}) for gather in ("whole", "sharded")}
    for name, values in ways.items():
        values = values | {"engine": ZERO, "preflight": {"when": "never"}}
        train.run(config(pipeline, folder / name, **values), comm.env)

    def fail(samples: train_samples.Samples) -> None:
        raise DataError("no such caption")

    if comm.rank == 1:
        train_samples.Samples._of_held_out = fail  # type: ignore[assignment]
    values = drawing(gather="sharded") | {"engine": ZERO, "preflight": {"when": "never"}}
    try:
        train.run(config(pipeline, folder / "failing", **values), comm.env)
    except DataError as error:
        return str(error)
    return ""


def test_sharded_weights_draw_the_same_images_and_change_no_bit_of_two_ranks(pipeline, tmp_path):
    said = run_ranks(every_way, 2, pipeline, tmp_path)
    runs = {name: tmp_path / name for name in ("blind", "whole", "sharded")}
    rows = {name: [(row["loss"], row["grad_norm"]) for row in read_metrics(run)] for name, run in runs.items()}
    assert rows["blind"] == rows["whole"] == rows["sharded"]
    ends = {name: saved(run, 4) for name, run in runs.items()}
    for name in ("whole", "sharded"):
        assert ends[name].keys() == ends["blind"].keys()
        assert all(torch.equal(ends[name][key], value) for key, value in ends["blind"].items())
    sheets = {name: sorted((runs[name] / "samples").glob("*.png")) for name in ("whole", "sharded")}
    assert [path.name for path in sheets["whole"]] == ["step_000000002.png", "step_000000004.png"]
    assert [a.read_bytes() for a in sheets["whole"]] == [b.read_bytes() for b in sheets["sharded"]]
    listed = [json.loads(line) for line in (runs["sharded"] / "samples/training.jsonl").read_text().splitlines()]
    assert [(row["step"], len(row["seeds"])) for row in listed] == [(2, 1), (4, 1)]
    assert said == ["reading what to draw failed on rank 1: no such caption", "no such caption"]


def test_sharded_is_refused_for_a_model_that_draws_code_after_code(pipeline, tmp_path):
    with pytest.raises(ConfigError, match=r"samples\.gather=sharded: model\.kind=dalle draws code after code"):
        train.run(config(pipeline, tmp_path, samples={"every_steps": 2, "gather": "sharded"}), ALONE)


@pytest.mark.parametrize(
    ("kind", "gather", "drawn", "words"),
    [
        ("maskgit", "auto", True, "samples are drawn module by module: the whole weights (1073741824.0 GiB)"),
        ("maskgit", "whole", False, "and samples.gather asks for nothing else"),
        ("dalle", "auto", False, "and model.kind=dalle draws code after code"),
    ],
)
def test_weights_without_room_are_drawn_from_by_module_or_not_at_all(
    pipeline, tmp_path, monkeypatch, kind, gather, drawn, words
):
    said: list[str] = []
    for level in ("warning", "info"):
        monkeypatch.setattr(train_samples.log, level, lambda form, *words: said.append(form % words))
    monkeypatch.setattr(CommonEngine, "bytes_to_gather", lambda self: 2**60)
    values = drawing(gather=gather) | {"engine": {"dtype": "fp32", "ema": [0.9]}}
    values |= {} if kind == "maskgit" else {"model": tiny_pipeline.MODEL}
    train.run(config(pipeline, tmp_path, **values), ALONE)
    assert any(words in line for line in said), said
    assert (tmp_path / "samples/step_000000004.png").exists() == drawn
