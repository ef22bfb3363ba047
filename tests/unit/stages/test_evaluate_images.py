"""Drawn images beside reconstructed and other real ones; resumable, and never of fewer images than were asked for."""

import json
from pathlib import Path

import pytest
import tiny_pipeline
import torch

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError
from tokscale.data.raw.shapes.source import ShapesConfig, ShapesSource
from tokscale.data.raw.shards import write_shard
from tokscale.dist.env import ProcessEnv
from tokscale.inference.pretrained import Pretrained
from tokscale.stages import evaluate, export, train

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
    from tokscale.base.trust import allow_torchscript

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
        evaluate.run(config(world, tmp_path, reference=None), ALONE)
    with pytest.raises(DataError, match=r"no classes|label"):
        measured(world, tmp_path, classifier=str(world / "means.pt"))
