"""Drawn images beside reconstructed and other real ones; resumable, and never of fewer images than were asked for."""

import json
from pathlib import Path

import pytest
import tiny_pipeline
import torch
from safetensors.torch import save_file

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.rng import generator
from tokscale.base.trust import allow_torchscript
from tokscale.data.raw.images import encode_image
from tokscale.data.raw.shapes.source import ShapesConfig, ShapesSource
from tokscale.data.raw.shards import RawRecord, write_shard
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.dist.testing import run_ranks
from tokscale.inference.pretrained import Pretrained
from tokscale.stages import evaluate, evaluate_images, export, train
from tokscale.tokenizers.vqgan import perceptual

ALONE = ProcessEnv()


class Means(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean(dim=3).flatten(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """An export, 90 real images, and a network."""
    folder = tmp_path_factory.mktemp("world")
    tiny_pipeline.make_inputs(folder)
    shared = {name: folder / name for name in ("image_tokenizer", "text_tokenizer")} | {"run_dir": folder / "run"}
    keys = {"model": tiny_pipeline.MODEL, "loop": {"total_steps": 2}, "batch_size": 8, "data_dir": folder / "data"}
    train.run(decode(train.TrainConfig, shared | keys), ALONE)
    export.run(decode(export.ExportConfig, shared), ALONE)
    (folder / "raw").mkdir()
    source = ShapesSource(ShapesConfig(count=90), 0)
    write_shard(folder / "raw/a.tar", [source.record(number) for number in range(90)])
    torch.jit.script(Means()).save(str(folder / "means.pt"))
    return folder


def config(world: Path, out: Path, **values) -> evaluate.EvaluateConfig:
    keys = {
        "run_dir": world / "run",
        "reference": world / "raw",
        "count": 40,
        "features": str(world / "means.pt"),
        "allow_torchscript": True,
        "judge": False,
        "batch_size": 25,
        "out": out / "report.json",
    }
    return decode(evaluate.EvaluateConfig, keys | values)


def measured(world: Path, out: Path, **values) -> dict:
    with allow_torchscript():
        evaluate.run(config(world, out, **values), ALONE)
    return json.loads((out / "report.json").read_text())["images"]


def test_drawn_stands_beside_reconstructed_and_real_and_all_is_named(world, tmp_path):
    found = measured(world, tmp_path, per_prompt=2)
    assert found["drawn"]["count"] == 80 and found["reconstructed"]["count"] == found["real"]["count"] == 40
    assert abs(found["real"]["kid"]) < 4 * found["real"]["kid_error"] + 1e-9
    assert found["reconstructed"]["psnr"] > 0 and found["drawn"]["fd_is_a_level"] is False
    about = found["about"]
    assert about["network"] == "means.pt" and len(about["sha256"]) == 64 and about["prompts"] == 40
    assert "within_prompt" in found["diversity"] and (tmp_path / "samples/beside.png").exists()
    assert not list((tmp_path / "evaluate").glob("*"))


def test_who_starts_again_draws_only_what_is_missing(world, tmp_path, monkeypatch):
    plain, real, drawn = measured(world, tmp_path / "plain"), Pretrained.sample, []

    class PowerCutError(Exception):
        pass

    def sample(self, prompts, **options):
        drawn.append(len(prompts))
        if len(drawn) == 2:
            raise PowerCutError
        return real(self, prompts, **options)

    monkeypatch.setattr(Pretrained, "sample", sample)
    with pytest.raises(PowerCutError):
        measured(world, tmp_path / "cut")
    again = measured(world, tmp_path / "cut")
    assert drawn == [25, 15, 15] and again["drawn"].keys() == plain["drawn"].keys()
    for name, value in plain["drawn"].items():  # sums over features depend on where their memory lies
        assert again["drawn"][name] == pytest.approx(value, rel=1e-9), name


def test_fewer_images_than_asked_for_and_empty_questions_are_refused(world, tmp_path):
    with pytest.raises(DataError, match="holds 90 usable images, count=91 are asked for"):
        measured(world, tmp_path, count=91)
    with pytest.raises(ConfigError, match="nothing to measure"):
        evaluate.run(config(world, tmp_path, reference=None, features=None), ALONE)
    with pytest.raises(DataError, match=r"no classes|label"):
        measured(world, tmp_path, classifier=str(world / "means.pt"))


def test_images_that_are_a_few_again_and_again_are_refused(world, tmp_path):
    grey_of_two_classes(tmp_path / "raw", step=0)
    with pytest.raises(DataError, match="40 images of which 2 are different, too few to compare with; give a ref"):
        measured(world, tmp_path, reference=tmp_path / "raw")


def test_images_of_others_are_not_judged_as_shapes_unless_somebody_says_so(world, tmp_path):
    for judge, wanted in (("auto", False), (True, True), (False, False)):
        assert evaluate._judged(config(world, tmp_path, judge=judge)) == wanted


@pytest.mark.parametrize(
    ("key", "asked"),
    [
        ("features", {}),
        ("per_prompt", {"per_prompt": 2, "features": None}),
        ("lpips", {"lpips": {"vgg": "vgg.pth"}, "features": None}),
        ("classifier", {"classifier": "means.pt", "features": None}),
    ],
)
def test_what_nobody_would_read_is_refused_by_name(world, tmp_path, key, asked):
    with pytest.raises(ConfigError, match=f"^{key} is about images of a reference: give reference=FOLDER, or leave"):
        evaluate.run(config(world, tmp_path, reference=None, held_out=world / "raw", **asked), ALONE)


def test_a_classifier_of_other_classes_is_refused_before_anything_is_drawn(world, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_images, "draw_in_parts", lambda *given: pytest.fail("drew"))
    grey_of_two_classes(tmp_path / "raw", labels=(0, 7))
    torch.jit.script(Bright()).save(str(tmp_path / "bright.pt"))
    with pytest.raises(DataError, match=r"bright\.pt knows 2 classes, .*raw has class 7; give the classifier of these"):
        measured(world, tmp_path, reference=tmp_path / "raw", classifier=str(tmp_path / "bright.pt"))


def random_vgg(path: Path) -> Path:
    """Weights under torchvision's names."""
    tensors, layer, width, draw = {}, 0, 3, generator(0, "vgg")
    for stage in perceptual.STAGES:
        for outputs in stage:
            tensors[f"features.{layer}.weight"] = torch.randn(outputs, width, 3, 3, generator=draw) / (3 * width**0.5)
            tensors[f"features.{layer}.bias"] = torch.zeros(outputs)
            layer, width = layer + 2, outputs
        layer += 1
    save_file(tensors, path)
    return path


def test_lpips_is_a_mean_over_images_by_the_weights_given(tmp_path):
    asked = perceptual.PerceptualConfig(vgg=random_vgg(tmp_path / "vgg.safetensors"))
    draw = generator(0, "pixels")
    real, rebuilt = (torch.randint(0, 256, (18, 3, 16, 16), generator=draw).byte() for _ in range(2))
    loss = perceptual.PerceptualLoss.from_files(asked)
    each = [loss(b[None].float() / 255, a[None].float() / 255).item() for a, b in zip(real, rebuilt, strict=True)]
    found = evaluate_images._fidelity(loss, real, rebuilt)
    assert found["lpips"] == pytest.approx(sum(each) / 18, rel=1e-4) and found["lpips"] > 0


def test_class_accuracy_asks_the_classifier_for_the_class_of_each_image(world, tmp_path):
    """Brightness tells the classes of the real images apart, and nothing drawn by a model of two steps is any."""
    grey_of_two_classes(tmp_path / "raw")
    torch.jit.script(Bright()).save(str(tmp_path / "bright.pt"))
    keys = {"reference": tmp_path / "raw", "classifier": str(tmp_path / "bright.pt"), "per_prompt": 2}
    found = measured(world, tmp_path / "out", **keys)["class_accuracy"]
    assert found["real"] == 1.0 and found["about"]["network"] == "bright.pt"
    assert 0.0 <= found["drawn"] <= 1.0


def grey_of_two_classes(folder: Path, labels: tuple[int, int] = (0, 1), step: int = 1) -> None:
    folder.mkdir()
    values = [40 + 170 * (number % 2) + step * (number // 2) for number in range(90)]
    grey = [torch.full((3, 8, 8), value, dtype=torch.uint8) for value in values]
    records = [
        RawRecord(f"{number:03d}", encode_image(image, "png"), "png", "a circle", label=labels[number % 2])
        for number, image in enumerate(grey)
    ]
    write_shard(folder / "a.tar", records)


class Bright(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        bright = pixels.float().mean(dim=(1, 2, 3)) / 255
        return torch.stack([1 - bright, bright], 1)


def rank(comm: Comm, world: Path, out: Path) -> None:
    with allow_torchscript():
        evaluate.run(config(world, out, batch_size=7), comm.env)


def test_two_ranks_write_the_report_of_one(world, tmp_path):
    alone = measured(world, tmp_path / "alone", batch_size=7)
    run_ranks(rank, 2, world, tmp_path / "both")
    both = json.loads((tmp_path / "both/report.json").read_text())["images"]
    assert both.keys() == alone.keys() and both["about"] == alone["about"]
    for name, value in alone["drawn"].items():
        assert both["drawn"][name] == pytest.approx(value, rel=1e-6), name
