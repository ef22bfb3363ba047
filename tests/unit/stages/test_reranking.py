"""Pictures ranked by a CLIP: in `sample`, as a score, and by finding captions again."""

from pathlib import Path

import pytest
import tiny_road
import torch

import tokscale
from tokscale.base import rng
from tokscale.base.config import decode, encode
from tokscale.base.errors import ConfigError
from tokscale.base.files import read_json
from tokscale.checkpoint.export import ExportOptions, write_export
from tokscale.dist.env import ProcessEnv
from tokscale.models.clip import CLIP, CLIPConfig
from tokscale.models.dalle import DALLE, DALLEConfig
from tokscale.stages import sample
from tokscale.stages.scorer import best, load_scorer, retrieval_rank
from tokscale.tokenizers.image import load_image_tokenizer
from tokscale.tokenizers.text import load_text_tokenizer

SIZES = {"dim_text": 8, "dim_image": 8, "dim_latent": 4, "text_enc_depth": 1, "text_heads": 1, "visual_enc_depth": 1}
CLIP_OPTIONS = SIZES | {"visual_heads": 1, "dim_head": 8, "text_seq_len": 6, "visual_image_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Exports of a DALL-E and of a CLIP, both as they were initialised."""
    folder = tmp_path_factory.mktemp("exports")
    tiny_road.make_image_tokenizer(folder / "image_tokenizer")
    tiny_road.train_bpe(tiny_road.CAPTIONS, 280, folder / "text_tokenizer")
    image, text = load_image_tokenizer(folder / "image_tokenizer"), load_text_tokenizer(folder / "text_tokenizer")
    dalle = decode(DALLEConfig, tiny_road.MODEL).fitted(image, text)
    clip = decode(CLIPConfig, CLIP_OPTIONS | {"visual_patch_size": 4}).fitted(image, text)
    for name, model, config in (("dalle", DALLE, dalle), ("clip", CLIP, clip)):
        with rng.scope(0, name):
            state = model(config).state_dict()
        with torch.device("meta"):
            meta = model(config)
        extras = {kind: folder / kind for kind in ("text_tokenizer", "image_tokenizer")}
        options = ExportOptions(extras=extras if name == "dalle" else {"text_tokenizer": extras["text_tokenizer"]})
        write_export(folder / name, meta_model=meta, model_config=encode(config), state_dict=state, options=options)
    return folder


def drawn(folder: Path, out: Path, **options: object) -> list[dict[str, object]]:
    keys = {"export": folder / "dalle", "out": out, "prompts": tiny_road.CAPTIONS[:2]}
    result = sample.run(decode(sample.SampleConfig, keys | options), ProcessEnv())
    return read_json(result.outputs["listing"])["pictures"]


def test_the_best_of_many_are_kept_best_first(folder, tmp_path):
    every = drawn(folder, tmp_path / "every", num_images=6, rerank=folder / "clip")
    kept = drawn(folder, tmp_path / "kept", num_images=2, best_of=3, rerank=folder / "clip")
    assert len(every) == 12 and len(kept) == 4
    for prompt in tiny_road.CAPTIONS[:2]:
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
    keys = {"export": folder / "dalle", "out": tmp_path, "prompts": tiny_road.CAPTIONS[:2], "num_images": 2}
    config = decode(sample.SampleConfig, keys | {"best_of": 2, "rerank": folder / "clip"})
    assert sample.run(config, ProcessEnv()).skipped
    with pytest.raises(ConfigError, match="best_of=2 needs something to choose with"):
        decode(sample.SampleConfig, keys | {"best_of": 2})


def test_a_clip_loads_saves_and_scores_pictures_of_any_size(folder, tmp_path):
    scorer = tokscale.load(folder / "clip")
    pictures = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=rng.generator(0, "pictures"))
    captions = tiny_road.CAPTIONS[:3]
    text, mask = scorer.text_tokenizer.encode(captions, 6)
    wanted = scorer.model.score(text, mask, pictures) / scorer.model.logit_scale()
    torch.testing.assert_close(scorer.score(captions, pictures), wanted.detach())
    large = pictures.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert scorer.score(captions, large).shape == (3,)
    scorer.save_pretrained(tmp_path / "again")
    assert torch.equal(load_scorer(tmp_path / "again").score(captions, pictures), scorer.score(captions, pictures))
    with pytest.raises(ConfigError, match="holds a model of kind 'dalle'; only a CLIP scores pictures"):
        load_scorer(folder / "dalle")


def test_ranks_count_the_captions_that_fit_better():
    captions = torch.eye(4)
    pictures = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.5, 0.1, 0.2], [0.0, 0.0, 1.0, 1.0], [0.4, 0.3, 0.2, 0.1]])
    assert retrieval_rank(captions, pictures).tolist() == [0, 1, 1, 3]
    assert retrieval_rank(torch.ones(4, 4), pictures).tolist() == [3, 3, 3, 3], "what cannot tell finds nothing"
    assert best(torch.tensor([[0.1, 0.3, 0.3], [2.0, -1.0, 3.0]]), 2).tolist() == [[1, 2], [2, 0]]
