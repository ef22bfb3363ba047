"""CLIP through the stages: it trains on raw images without an image tokenizer, is exported, and scores."""

from pathlib import Path

import pytest
import tiny_pairs

import tokscale
from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.dist.env import ProcessEnv
from tokscale.stages import export, train
from tokscale.train.metrics import read_metrics

ALONE = ProcessEnv()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    tiny_pairs.make_pairs(folder)
    return folder


def config(folder: Path, run_dir: Path, **values: object) -> train.TrainConfig:
    return decode(train.TrainConfig, tiny_pairs.keys(folder, run_dir) | values)


def test_it_trains_without_an_image_tokenizer_and_scores_its_pairs_best(pairs, tmp_path):
    result = train.run(config(pairs, tmp_path), ALONE)
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert losses[-1] < 0.5 * losses[0] and "clip at step" in result.summary
    made = export.run(export.ExportConfig(run_dir=tmp_path), ALONE)
    assert "rerank=" in made.summary and not made.next_command
    assert not (tmp_path / "export" / "image_tokenizer").exists()
    assert "model.score(" in (tmp_path / "export" / "README.md").read_text()
    scorer = tokscale.load(tmp_path / "export")
    captions, images = tiny_pairs.CAPTIONS, tiny_pairs.images()
    right = scorer.score(captions, images)
    assert (right > scorer.score(captions[1:] + captions[:1], images)).all()
    assert train.run(config(pairs, tmp_path), ALONE).skipped


def test_the_size_of_the_images_must_be_known(pairs, tmp_path):
    model = {name: value for name, value in tiny_pairs.MODEL.items() if name != "visual_image_size"}
    with pytest.raises(ConfigError, match=r"model\.visual_image_size"):
        train.run(config(pairs, tmp_path, model=model), ALONE)
