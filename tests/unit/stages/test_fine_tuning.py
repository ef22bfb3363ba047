"""`init_resize`, `freeze` and `optim.lr_scales`: an export goes on with other captions."""

from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import torch
from safetensors.torch import load_file

from tokscale.base.config import decode
from tokscale.base.errors import CheckpointError, ConfigError
from tokscale.base.files import read_json
from tokscale.dist.env import ProcessEnv
from tokscale.stages import export, train
from tokscale.tokenizers.text import load_text_tokenizer, train_bpe
from tokscale.train.metrics import read_metrics

MODEL = {**tiny_pipeline.MODEL, "rotary_emb": False}
LONGER = {**MODEL, "text_seq_len": 9}


def run(pipeline: Path, run_dir: Path, steps: int, **values: Any) -> list[dict[str, Any]]:
    keys = {
        "run_dir": run_dir,
        "data_dir": pipeline / "data",
        "image_tokenizer": pipeline / "image_tokenizer",
        "text_tokenizer": pipeline / "text_tokenizer",
        "model": MODEL,
        "device": "cpu",
        "optim": {"lr": 1e-2},
        "schedule": {"kind": "constant"},
        "loop": {"total_steps": steps, "log_every": 1},
        "batch_size": 8,
    }
    train.run(decode(train.TrainConfig, keys | values), ProcessEnv())
    export.run(export.ExportConfig(run_dir=run_dir), ProcessEnv())
    return read_metrics(run_dir)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> tuple[Path, Path]:
    """Inputs, a run on them with its export, and another vocabulary that knows some of the same words."""
    pipeline, run_dir = tmp_path_factory.mktemp("pipeline"), tmp_path_factory.mktemp("parent")
    tiny_pipeline.make_inputs(pipeline)
    run(pipeline, run_dir, 24)
    others = [caption.replace("circle", "big round thing") for caption in tiny_pipeline.CAPTIONS]
    train_bpe(others, 300, pipeline / "other_words")
    return pipeline, run_dir


def test_a_run_with_other_words_and_longer_captions_begins_ahead_of_a_new_one(parent, tmp_path):
    pipeline, origin = parent
    other = {"model": LONGER, "text_tokenizer": pipeline / "other_words"}
    with pytest.raises(CheckpointError, match="tensors do not fit the model"):
        run(pipeline, tmp_path / "refused", 1, init_from=origin / "export", **other)
    tuned = run(pipeline, tmp_path / "tuned", 3, init_from=origin / "export", init_resize=True, **other)
    fresh = run(pipeline, tmp_path / "fresh", 3, **other)
    assert tuned[0]["loss/image"] < 0.8 * fresh[0]["loss/image"], "what it knows of images is not lost"
    said = read_json(tmp_path / "tuned" / "init_from.json")
    words = load_text_tokenizer(pipeline / "other_words").num_tokens
    assert set(said["resized"]) == {"text_emb.weight", "text_head.weight", "text_head.bias", "positions.text"}
    assert said["resized"]["positions.text"] == "(7, 16) stored, (10, 16) here: 7 rows taken over, 3 new"
    assert f"({words + 9}, 16) here" in said["resized"]["text_emb.weight"] and said["fresh"] == []


def test_words_are_found_by_what_they_are(parent, tmp_path):
    pipeline, origin = parent
    keys = {"model": MODEL, "text_tokenizer": pipeline / "other_words"}
    frozen = {"freeze": ["text_emb*"], "init_from": origin / "export", "init_resize": True}
    run(pipeline, tmp_path, 1, **keys, **frozen)
    before, after = weights(origin)["text_emb.weight"], weights(tmp_path)["text_emb.weight"]
    old = load_text_tokenizer(pipeline / "text_tokenizer").numbers()
    new = load_text_tokenizer(pipeline / "other_words").numbers()
    moved = [word for word in new if word in old and new[word] != old[word]]
    assert moved, "some word has another number now"
    for word in set(new) & set(old):
        assert torch.equal(after[new[word]], before[old[word]]), word


def test_frozen_parts_stay_and_others_learn_at_their_own_rate(parent, tmp_path):
    pipeline, origin = parent
    before = weights(origin)
    keys = {"init_from": origin / "export", "optim": {"lr": 1e-3, "lr_scales": {"text_*": 0.01, "*.bias": 3.0}}}
    run(pipeline, tmp_path, 1, freeze=["image_emb*", "stack.*"], **keys)
    after = weights(tmp_path)
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    for name, most in moved.items():
        if name.startswith(("image_emb", "stack.")):
            assert most == 0, name
        elif name.endswith(".bias"):
            assert most == pytest.approx(3e-3, rel=0.05), name
        elif name.startswith("text_"):
            assert 0 < most < 2e-5, name
        else:
            assert most == pytest.approx(1e-3, rel=0.2), name


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"freeze": ["stak.*"]}, "freeze: 'stak.*' matches no parameter"),
        ({"freeze": ["*"]}, "freeze: nothing is left to train"),
        ({"optim": {"lr_scales": {"stak.*": 2.0}}}, "optim.lr_scales: 'stak.*' matches no parameter that is trained"),
        ({"optim": {"lr_scales": {"stack.*": 2.0}}, "freeze": ["stack.*"]}, "'stack.*' matches no parameter that is"),
        ({"init_resize": True}, "fits the weights of init_from, which is not given"),
    ],
)
def test_patterns_that_change_nothing_are_refused(parent, tmp_path, options, answer):
    with pytest.raises(ConfigError, match=answer.replace("*", r"\*")):
        run(parent[0], tmp_path, 1, **options)


def test_only_exports_of_the_same_kind_are_fitted(parent, tmp_path):
    pipeline, origin = parent
    with pytest.raises(ConfigError, match="is no export, and only exports bring their tokenizers"):
        run(pipeline, tmp_path / "a", 1, init_from=origin / "checkpoints", init_resize=True)
    told = {"kind": "caption", "depth": 1, "heads": 2, "dim_head": 8}
    other = {"kind": "maskgit", "dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "condition": told}
    with pytest.raises(ConfigError, match=r"holds a dalle, and model\.kind=maskgit"):
        run(pipeline, tmp_path / "b", 1, init_from=origin / "export", init_resize=True, model=other)
