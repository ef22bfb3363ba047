"""Images of several shapes in one run: trained, resumed, exported, drawn in each size, and measured."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import torch
from tiny_buckets import BUCKETS, GRIDS, act, make_pipeline, training, write_raw

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError
from tokscale.checkpoint.reader import Checkpoint
from tokscale.data.raw.images import decode_image
from tokscale.dist.env import ProcessEnv
from tokscale.evaluation.measures import NoneOfThatShapeError, Shape, load_eval_pairs
from tokscale.inference.pretrained import Pretrained, load_pretrained
from tokscale.stages import evaluate, export, sample, train
from tokscale.train.metrics import read_metrics

ALONE = ProcessEnv()
SMALL = {"dim": 16, "heads": 2, "dim_head": 8, "text_seq_len": 6}
CAPTION = {"kind": "caption", "depth": 1, "heads": 2, "dim_head": 8}
MODELS = {
    "dalle": tiny_pipeline.MODEL | {"rotary_emb": False, "attn_types": ["full", "axial_row"]},
    "maskgit": SMALL | {"kind": "maskgit", "depth": 1, "condition": CAPTION},
    "parti": {k: v for k, v in SMALL.items() if k != "text_seq_len"}
    | {"kind": "parti", "depth": 1, "condition": CAPTION, "max_text_len": 6},
    "rqtransformer": SMALL | {"kind": "rqtransformer", "spatial_layers": 1, "depth_layers": 1, "condition": CAPTION},
}

RUN: dict[str, Any] = {
    "loop": {"total_steps": 6, "log_every": 1},
    "checkpoint": {"every_steps": 3},
    "data": {"held_out": {"share": 0.2}},
    "held_out": {"every_steps": 3},
    "samples": {"every_steps": 6},
    "optim": {"lr": 1e-2},
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    make_pipeline(folder, (30, 20, 10))
    act(folder, streams={})
    return folder


def trained(pipeline: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    keys = training(pipeline, run_dir, **changes)
    train.run(decode(train.TrainConfig, keys), ALONE)
    return keys


def exported(pipeline: Path, run_dir: Path) -> Pretrained:
    keys = {"run_dir": run_dir, "image_tokenizer": pipeline / "image_tokenizer"}
    export.run(decode(export.CONFIG, keys), ALONE)
    return load_pretrained(run_dir / "export")


@pytest.fixture(scope="module")
def run_dir(pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trained(pipeline, folder, **RUN)
    exported(pipeline, folder)
    return folder


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_trains_on_all_buckets_is_exported_and_draws_each_size(pipeline, tmp_path, kind):
    trained(pipeline, tmp_path, model=MODELS[kind])
    model = exported(pipeline, tmp_path)
    assert list(model.tokenizers) == ["8x8", "12x8", "8x16"]  # the most samples first
    assert model.config.image_grids == tuple(GRIDS[name] for name in BUCKETS) and model.config.image_grid == (8, 6)
    for name in BUCKETS:
        width, height = map(int, name.split("x"))
        assert model.sample(tiny_pipeline.CAPTIONS[:2], size=name).shape == (2, 3, height, width)
    assert torch.equal(model.sample("a"), model.sample("a", size="8x8"))
    assert not torch.equal(model.sample("a").flatten()[:96], model.sample("a", size="12x8").flatten()[:96])
    with pytest.raises(
        ConfigError, match="size: got '16x16'; this model draws images of 8x8, 12x8, 8x16, those it was"
    ):
        model.sample("a", size="16x16")


def test_held_out_samples_of_all_shapes_are_measured_and_samples_drawn(run_dir):
    rows = {row["step"]: row for row in read_metrics(run_dir)}
    assert rows[3]["held_out/loss"] > 0 and rows[6]["held_out/loss"] < rows[3]["held_out/loss"]
    assert (run_dir / "samples" / "step_000000006.png").exists()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder / "checkpoints" / "step_000000006")
    with checkpoint.source("model") as source:
        sizes = {name: math.prod(source.shape(name, "weight")) for name in source.names()}
        return {name: source.read(name, "weight", 0, size) for name, size in sizes.items()}


def test_a_run_that_is_resumed_has_the_bits_of_one_that_was_not(pipeline, run_dir, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    wanted = weights(run_dir)
    shutil.rmtree(again / "checkpoints" / "step_000000006")
    state = Checkpoint(again / "checkpoints" / "step_000000003").state["loader"]
    assert state["position"] == 24 and len(state["shapes"]) == 3 and state["batch_size"] == 8
    trained(pipeline, again, **RUN)
    found = weights(again)
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_the_sample_stage_takes_a_size_and_refuses_others(run_dir, tmp_path):
    keys = {"run_dir": run_dir, "prompts": ["a red circle"], "size": "8x16", "device": "cpu"}
    sample.run(decode(sample.CONFIG, keys | {"out": tmp_path / "tall"}), ALONE)
    (image,) = (tmp_path / "tall").glob("0000*.png")
    assert decode_image(image.read_bytes()).shape == (3, 16, 8)
    with pytest.raises(ConfigError, match="this model draws images of 8x8, 12x8, 8x16"):
        sample.run(decode(sample.CONFIG, keys | {"out": tmp_path / "none", "size": "9x9"}), ALONE)


def test_evaluate_measures_each_size_on_the_images_of_its_shape(pipeline, run_dir, tmp_path):
    write_raw(tmp_path / "unseen", (6, 4, 0), seed=5)
    keys = {"run_dir": run_dir, "data_dir": pipeline / "data", "held_out": tmp_path / "unseen", "judge": False}
    evaluate.run(decode(evaluate.CONFIG, keys | {"out": tmp_path / "report.json", "device": "cpu"}), ALONE)
    sizes = json.loads((tmp_path / "report.json").read_text())["sizes"]
    assert list(sizes) == sorted(BUCKETS) and "no image of the shape 8x16" in sizes["8x16"]["left_out"]["held_out"]
    model = load_pretrained(run_dir / "export").of_size("12x8")
    captions, images = load_eval_pairs(tmp_path / "unseen", model.shape)
    assert images.shape == (4, 3, 8, 12)
    (batch,) = model.batches(captions, images, 8)
    with torch.no_grad():
        wanted = model.model(batch).total.item()
    assert sizes["12x8"]["held_out_losses"]["total"] == pytest.approx(wanted, rel=1e-6)
    assert sizes["8x8"]["held_out_losses"]["total"] != sizes["12x8"]["held_out_losses"]["total"]


def test_images_are_told_apart_and_cut_as_tokenization_does(pipeline):
    sizes = tuple((int(name.split("x")[1]), int(name.split("x")[0])) for name in BUCKETS)
    for size, count in zip(sizes, (30, 20, 10), strict=True):
        _, images = load_eval_pairs(pipeline / "data" / "raw", Shape(size, sizes))
        assert images.shape == (count, 3, *size)
    with pytest.raises(NoneOfThatShapeError, match="no image of the shape 100x8"):
        load_eval_pairs(pipeline / "data" / "raw", Shape((8, 100), (*sizes, (8, 100))))


def test_one_bucket_can_still_be_picked_and_a_model_of_one_shape_says_how(pipeline, tmp_path):
    tokens = pipeline / "data" / "tokens"
    picked = {"sources": [{"path": str(tokens), "buckets": ["12x8"]}]}
    trained(pipeline, tmp_path / "one", data=picked)
    assert "image_grids" not in Checkpoint(tmp_path / "one" / "checkpoints/step_000000002").state["models"]["model"]
    lowres = MODELS["maskgit"] | {"lowres": {"image_grid": (2, 2), "num_tokens": 12}}
    with pytest.raises(ConfigError, match=r"model\.lowres: .*data\.sources=\[\{path: FOLDER, buckets: \[NAME\]\}\]"):
        trained(pipeline, tmp_path / "low", model=lowres)


def test_another_tokenizers_bucket_is_refused_by_its_folder(pipeline, tmp_path):
    tiny_pipeline.make_image_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match=r"tokens/12x8: codes holds ids of the image tokenizer"):
        trained(pipeline, tmp_path / "run", image_tokenizer=str(tmp_path / "other"))
