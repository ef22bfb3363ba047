"""A second model that reads images, from outside: it trains, is exported, scores and ranks by its class alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny_exports
import tiny_pairs
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import tokscale
from tokscale.base.batch import ImageBatch, LossOutput
from tokscale.base.config import decode
from tokscale.dist.env import ProcessEnv
from tokscale.inference.scorer import Scorer
from tokscale.models import registry
from tokscale.models.model import AnyModelConfig, ScoringModel
from tokscale.stages import export, sample, train
from tokscale.train.metrics import read_metrics

ALONE = ProcessEnv()


class ColoursConfig(AnyModelConfig):
    """A bag of words and a mean colour."""

    kind: Literal["colours"] = "colours"
    visual_image_size: int | None = 8
    channels: int = 3
    text_seq_len: int = 6
    num_text_tokens: int | None = None

    def fitted(self, image: Any, text: Any) -> "ColoursConfig":
        return self.model_copy(update={"num_text_tokens": text.num_tokens})


class Colours(ScoringModel):
    config_class = ColoursConfig

    def __init__(self, config: ColoursConfig):
        super().__init__()
        assert config.num_text_tokens is not None
        self.config = config
        self.words = nn.Embedding(config.num_text_tokens, 8)
        self.see = nn.Linear(config.channels, 8)

    def encode_text(self, text: Tensor, text_mask: Tensor) -> Tensor:
        real = rearrange(text_mask, "b n -> b n 1").to(self.words.weight.dtype)
        return F.normalize((self.words(text) * real).sum(1), dim=-1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.see(pixels.to(self.see.weight.dtype).mean((2, 3)) / 128 - 1), dim=-1)

    def forward(self, batch: ImageBatch) -> LossOutput:
        similar = 10 * self.encode_text(batch.text, batch.text_mask) @ self.encode_image(batch.pixels).t()
        loss = F.cross_entropy(similar.float(), torch.arange(len(similar)))
        return LossOutput(loss, {"pairs": loss})

    def train_flops(self) -> float:
        return 1.0


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    tiny_pairs.make_pairs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.MODELS._entries, "colours", Colours)
        keys: Mapping[str, Any] = tiny_pairs.keys(folder, folder / "run") | {"model": {"kind": "colours"}}
        train.run(decode(train.TrainConfig, keys | {"optim": {"lr": 0.1}}), ALONE)
        made = export.run(export.ExportConfig(run_dir=folder / "run"), ALONE)
    assert "rerank=" in made.summary and not made.next_command
    return folder / "run"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.MODELS._entries, "colours", Colours)


def test_it_trains_on_raw_images_and_scores_its_own_pairs_best(run_dir):
    losses = [row["loss"] for row in read_metrics(run_dir)]
    assert losses[-1] < 0.7 * losses[0]
    scorer = tokscale.load(run_dir / "export")
    assert isinstance(scorer, Scorer) and isinstance(scorer.model, Colours)
    assert "model.score(" in (run_dir / "export" / "README.md").read_text()
    captions, images = tiny_pairs.CAPTIONS, tiny_pairs.images()
    right = scorer.score(captions, images).mean()
    assert right > scorer.score(captions[1:] + captions[:1], images).mean() + 0.2


def test_it_ranks_what_another_model_draws(run_dir, tmp_path):
    tiny_exports.make_exports(tmp_path)
    keys = {"export": tmp_path / "dalle", "prompts": ["a bright red square"], "best_of": 3, "out": tmp_path / "out"}
    result = sample.run(decode(sample.SampleConfig, keys | {"rerank": run_dir / "export"}), ALONE)
    assert "clip" in next((tmp_path / "out").rglob("*.json")).read_text(), result.summary
