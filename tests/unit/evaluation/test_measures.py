"""What `evaluate` measures on images with captions."""

import io
import re
import shlex
import tarfile
from pathlib import Path

import pytest
import tiny_exports
import tiny_pairs
import torch
from PIL import Image
from token_folders import make_tokens

from tokscale.base.batch import TokenBatch
from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.files import read_json
from tokscale.cli import main
from tokscale.data.raw.images import encode_image
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


def test_what_is_no_folder_of_raw_shards_is_told_how_to_become_one(tmp_path, monkeypatch, capsys):
    with pytest.raises(DataError, match="nowhere: no such folder; name one of raw shards, as `tokscale prepare`"):
        load_eval_pairs(tmp_path / "nowhere", 8)
    make_tokens(tmp_path / "tokens")
    with pytest.raises(DataError, match="tokens: holds token shards, and images are wanted"):
        load_eval_pairs(tmp_path / "tokens", 8)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        Image.new("RGB", (9, 9), (80 * number, 0, 0)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a red square")
    with pytest.raises(
        DataError, match=r"pictures: holds image files and no raw shards; .*then name FOLDER/raw"
    ) as told:
        load_eval_pairs(pictures, 8)
    monkeypatch.chdir(tmp_path)
    command = re.search("`tokscale ([^`]*)`", str(told.value))[1]
    assert main([*shlex.split(command), "run_dir=run"]) == 0, capsys.readouterr().err
    captions, images = load_eval_pairs(Path("FOLDER/raw"), 8)
    assert captions == ["a red square"] * 3 and images.shape == (3, 3, 8, 8)


@pytest.mark.parametrize(("classes", "way"), [(False, "images with captions"), (True, "images with their classes")])
def test_images_without_what_the_model_is_told_are_told_so(tmp_path, classes, way):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        image = encode_image(torch.zeros(3, 8, 8, dtype=torch.uint8), "png")
        member = tarfile.TarInfo("0.png")
        member.size = len(image)
        tar.addfile(member, io.BytesIO(image))
    with pytest.raises(DataError, match=f"none of 1 samples can be used, .*; give {way}"):
        load_eval_pairs(tmp_path, 8, classes=classes)


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
