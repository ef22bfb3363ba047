"""What `evaluate` measures on images with captions."""

from pathlib import Path

import pytest
import tiny_exports
import tiny_pairs
import torch

from tokscale.base.batch import TokenBatch
from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.base.files import read_json
from tokscale.dist.env import ProcessEnv
from tokscale.evaluation.measures import clip_metrics, load_eval_pairs, mean_losses
from tokscale.inference.pretrained import load_pretrained
from tokscale.stages import evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    tiny_exports.make_exports(folder)
    tiny_pairs.make_pairs(folder)
    return folder


def test_losses_with_and_without_captions_are_the_models_own(folder):
    pretrained = load_pretrained(folder / "dalle")
    captions, images = load_eval_pairs(folder / "data/raw", 8)
    assert captions == tiny_pairs.CAPTIONS and torch.equal(images, tiny_pairs.images())
    text, mask = pretrained.text_tokenizer.encode(captions, pretrained.model.text_seq_len)
    codes = pretrained.image_tokenizer.encode(images)
    for told in (True, False):
        given = TokenBatch(torch.arange(8), text, mask if told else torch.zeros_like(mask), codes)
        wanted = pretrained.model(given)
        found = mean_losses(pretrained.model, pretrained.batches(captions, images, 3, keep_condition=told))
        assert found["total"] == pytest.approx(wanted.total.item(), rel=1e-5)
        assert found["image"] == pytest.approx(wanted.parts["image"].item(), rel=1e-5)
    with_captions, without = (
        mean_losses(pretrained.model, pretrained.batches(captions, images, 8, keep_condition=keep))
        for keep in (True, False)
    )
    assert with_captions["image"] != without["image"]


def test_fewer_pairs_are_spread_over_the_set(folder):
    captions, images = load_eval_pairs(folder / "data/raw", 4, at_most=4)
    assert captions == tiny_pairs.CAPTIONS[::2] and images.shape == (4, 3, 4, 4)


def test_clip_metrics_of_known_vectors():
    captions, images = torch.eye(4), torch.eye(4)[[0, 1, 2, 0]]
    found = clip_metrics(captions, images, top=1)
    assert found["score"] == pytest.approx(75) and found["found"] == pytest.approx(0.75)
    assert found["chance"] == 0.25 and found["times_chance"] == pytest.approx(3.0) and found["pool"] == 4


def test_an_image_that_contradicts_its_caption_takes_nothing_from_the_others_score():
    captions, images = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    assert clip_metrics(captions, images, top=1)["score"] == pytest.approx(50)


def test_the_stage_reports_them_and_a_grid(folder, tmp_path):
    keys = {"export": folder / "dalle", "out": tmp_path / "report.json", "run_dir": tmp_path, "judge": False}
    asked = {"held_out": folder / "data/raw", "clip": folder / "clip", "pool": 6, "top": 2, "batch_size": 4}
    result = evaluate.run(decode(evaluate.EvaluateConfig, keys | asked), ProcessEnv())
    report = read_json(tmp_path / "report.json")
    assert report["held_out_losses"]["image"] > 0 and report["held_out_losses_without_captions"]["image"] > 0
    drawn, real = report["clip"]["raw"]["drawn"], report["clip"]["raw"]["real"]
    assert drawn["pool"] == real["pool"] == 6 and drawn["chance"] == pytest.approx(2 / 6)
    assert (tmp_path / "samples/drawn-raw.png").exists() and "times chance" in result.summary
    with pytest.raises(ConfigError, match="say whose"):
        evaluate.run(decode(evaluate.EvaluateConfig, keys | {"clip": folder / "clip"}), ProcessEnv())
