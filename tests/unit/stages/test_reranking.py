"""Images ranked by a CLIP: in `sample`, as a score, and by finding captions again."""

from pathlib import Path

import pytest
import tiny_exports
import tiny_pipeline
import torch

import tokscale
from tokscale.base import rng
from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.base.files import read_json
from tokscale.dist.env import ProcessEnv
from tokscale.evaluation.measures import best, retrieval_rank
from tokscale.inference.scorer import load_scorer
from tokscale.stages import sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    tiny_exports.make_exports(folder)
    return folder


def drawn(folder: Path, out: Path, **options: object) -> list[dict[str, object]]:
    keys = {"export": folder / "dalle", "out": out, "prompts": tiny_pipeline.CAPTIONS[:2]}
    result = sample.run(decode(sample.SampleConfig, keys | options), ProcessEnv())
    return read_json(result.outputs["listing"])["images"]


def test_the_best_of_many_are_kept_best_first(folder, tmp_path):
    every = drawn(folder, tmp_path / "every", num_images=6, rerank=folder / "clip")
    kept = drawn(folder, tmp_path / "kept", num_images=2, best_of=3, rerank=folder / "clip")
    assert len(every) == 12 and len(kept) == 4
    for prompt in tiny_pipeline.CAPTIONS[:2]:
        scores = [row["clip"] for row in every if row["prompt"] == prompt]
        mine = [row for row in kept if row["prompt"] == prompt]
        assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
        assert [row["clip"] for row in mine] == pytest.approx(scores[:2])
        seeds = [row["seed"] for row in every if row["prompt"] == prompt]
        assert [row["seed"] for row in mine] == seeds[:2]
    for row, again in zip(kept[:2], every[:2], strict=True):
        assert (tmp_path / "kept" / row["file"]).read_bytes() == (tmp_path / "every" / again["file"]).read_bytes()


def test_another_way_of_choosing_is_another_request(folder, tmp_path):
    plain = drawn(folder, tmp_path, num_images=2)
    assert "clip" not in plain[0]
    ranked = drawn(folder, tmp_path, num_images=2, best_of=2, rerank=folder / "clip")
    assert "clip" in ranked[0]
    keys = {"export": folder / "dalle", "out": tmp_path, "prompts": tiny_pipeline.CAPTIONS[:2], "num_images": 2}
    config = decode(sample.SampleConfig, keys | {"best_of": 2, "rerank": folder / "clip"})
    assert sample.run(config, ProcessEnv()).skipped
    with pytest.raises(ConfigError, match="best_of=2 needs something to choose with"):
        decode(sample.SampleConfig, keys | {"best_of": 2})


def test_a_clip_loads_saves_and_scores_images_of_any_size(folder, tmp_path):
    scorer = tokscale.load(folder / "clip")
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=rng.generator(0, "pictures"))
    captions = tiny_pipeline.CAPTIONS[:3]
    text, mask = scorer.text_tokenizer.encode(captions, 6)
    wanted = scorer.model.score(text, mask, images) / scorer.model.logit_scale()
    torch.testing.assert_close(scorer.score(captions, images), wanted.detach())
    large = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert scorer.score(captions, large).shape == (3,)
    scorer.save_pretrained(tmp_path / "again")
    assert torch.equal(load_scorer(tmp_path / "again").score(captions, images), scorer.score(captions, images))
    with pytest.raises(ConfigError, match="holds a model of kind 'dalle'; only a CLIP scores images"):
        load_scorer(folder / "dalle")


def test_ranks_count_the_captions_that_fit_better():
    captions = torch.eye(4)
    images = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.5, 0.1, 0.2], [0.0, 0.0, 1.0, 1.0], [0.4, 0.3, 0.2, 0.1]])
    assert retrieval_rank(captions, images).tolist() == [0, 1, 1, 3]
    assert retrieval_rank(torch.ones(4, 4), images).tolist() == [3, 3, 3, 3], "what cannot tell finds nothing"
    assert best(torch.tensor([[0.1, 0.3, 0.3], [2.0, -1.0, 3.0]]), 2).tolist() == [[1, 2], [2, 0]]
