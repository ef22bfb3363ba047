"""Artefacts of format 1 (commit 02310aa, made by `tests/assets/make_format1.py`) mean today what they meant then."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tokscale
from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.base.formats import FORMAT, upgrade
from tokscale.checkpoint.manifest import read_checkpoint_manifest
from tokscale.dist.env import ProcessEnv
from tokscale.inference.pretrained import Pretrained
from tokscale.stages import export, train
from tokscale.tokenizers.image import load_image_tokenizer
from tokscale.train.metrics import read_metrics

OLD = Path(__file__).parents[2] / "assets" / "format1"
EXPECTED = json.loads((OLD / "expected.json").read_text())


@pytest.fixture(autouse=True)
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the old artefacts, which name each other by relative paths, as the current folder."""
    folder = Path(shutil.copytree(OLD, tmp_path / "old"))
    monkeypatch.chdir(folder)
    return folder


def config(run_dir: str, steps: int, **values: Any) -> train.TrainConfig:
    """The old run's configuration in today's words."""
    stored = yaml.safe_load((OLD / "run/config.yaml").read_text())["train"]
    assert stored["model"]["conv_window"] == "seed"
    stored["model"]["conv_window"] = "corner"
    stored["images"] = stored.pop("pictures")
    stored["data"]["partitions"] = stored["data"].pop("lanes")
    stored["loop"]["total_steps"] = steps
    return decode(train.TrainConfig, stored | {"run_dir": run_dir} | values)


def losses(run_dir: str) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(run_dir))]


def test_an_old_run_goes_on_as_it_would_have_then():
    train.run(config("run", 4), ProcessEnv())
    assert losses("run") == pytest.approx(EXPECTED["losses"], rel=1e-5)
    manifests = [read_checkpoint_manifest(Path(f"run/checkpoints/step_{step:09d}")) for step in (2, 4)]
    assert [manifest.format for manifest in manifests] == [1, FORMAT]
    written = yaml.safe_load(Path("run/config.yaml").read_text())["train"]
    assert written["model"]["conv_window"] == "corner" and "images" in written and "pictures" not in written


@pytest.mark.parametrize("origin", ["export", "run/checkpoints"])
def test_a_new_run_begins_with_old_weights(origin):
    train.run(config("new", 1, init_from=origin), ProcessEnv())
    assert losses("new")[0] < EXPECTED["losses"][1]


def test_an_old_checkpoint_becomes_an_export_in_todays_words():
    beside = {"image_tokenizer": Path("image_tokenizer"), "text_tokenizer": Path("text_tokenizer")}
    export.run(export.ExportConfig(run_dir=Path("run"), out=Path("again"), **beside), ProcessEnv())
    assert json.loads(Path("again/config.json").read_text())["conv_window"] == "corner"
    assert json.loads(Path("again/manifest.json").read_text())["format"] == FORMAT
    assert drawn("again") == EXPECTED["codes"]


def test_an_old_export_draws_the_same_codes_and_pixels():
    assert json.loads(Path("export/config.json").read_text())["conv_window"] == "seed"
    assert drawn("export") == EXPECTED["codes"]
    model, codes = tokscale.load("export"), EXPECTED["codes"]
    assert isinstance(model, Pretrained)
    pixels = model.image_tokenizer.decode(torch.tensor(codes))
    assert int(pixels.long().sum()) == pytest.approx(EXPECTED["pixels_sum"], rel=1e-4)


def test_old_tokenizers_have_the_fingerprints_that_their_shards_name():
    assert json.loads(Path("resized_tokenizer/config.json").read_text())["picture_size"] == [16, 8]
    resized = load_image_tokenizer("resized_tokenizer")
    assert resized.image_hw == (16, 8) and resized.fingerprint == EXPECTED["resized_fingerprint"]
    assert load_image_tokenizer("image_tokenizer").fingerprint == EXPECTED["fingerprint"]


def test_an_old_word_in_a_recipe_is_an_error_that_names_the_new_one():
    model = {"kind": "dalle", "dim": 8, "depth": 1, "heads": 1, "attn_types": ["conv_like"], "conv_window": "seed"}
    with pytest.raises(ConfigError, match=r"model\.conv_window: got 'seed'.*corner"):
        decode(train.TrainConfig, {"run_dir": "x", "data_dir": "data", "model": model})


def test_only_old_words_of_their_own_kind_are_replaced():
    nested = {"depth": [{"conv_window": "raster", "rel_pos_index": "raster"}], "picture_size": 3, "seed": "seed"}
    assert upgrade("model", nested) == nested | {"depth": [{"conv_window": "centered", "rel_pos_index": "raster"}]}
    assert upgrade("loader", {"position": 8, "lanes": 1}) == {"position": 8, "partitions": 1}
    assert upgrade("stage", {"figures": {"loss": 1.0}, "seconds": 2}) == {"metrics": {"loss": 1.0}, "seconds": 2}
    assert upgrade("run", {"pictures": {}, "quality": {"pictures": 8}}) == {"images": {}, "quality": {"images": 8}}
    assert upgrade("model", {"picture": [4, 4, 2]}) == {"returned_shape": [4, 4, 2]}
    assert upgrade("model", nested, FORMAT) is nested and upgrade("tokenizer", {"picture_size": 3}) == {"image_hw": 3}


def drawn(folder: str) -> list[Any]:
    model = tokscale.load(folder)
    assert isinstance(model, Pretrained)
    text, mask, extra = model.prompts(EXPECTED["prompts"])
    options = model.model.sampling_config()
    return model.model.generate_codes(text, mask, options=options, seeds=[0, 1], extra=extra).tolist()
