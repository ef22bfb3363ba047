"""Aspect buckets through the whole pipeline: tokenize, train on one of them, export, draw images of its shape."""

from pathlib import Path

import pytest
import tiny_pipeline
from tiny_buckets import BUCKETS, act, make_pipeline, training

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError
from tokscale.data.tokens.manifest import TokenDataset
from tokscale.dist.env import ProcessEnv
from tokscale.inference.pretrained import load_pretrained
from tokscale.stages import export, train
from tokscale.tokenizers.image import load_image_tokenizer

ALONE = ProcessEnv()
THREE_QUARTERS = {"image_size": 6}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("buckets")
    make_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(pipeline) -> Path:
    act(pipeline)
    return pipeline / "data" / "tokens"


def trained(pipeline: Path, run_dir: Path, *sources: Path) -> train.TrainConfig:
    values = training(pipeline, run_dir, data={"sources": [{"path": path} for path in sources]})
    config = decode(train.TrainConfig, values)
    train.run(config, ALONE)
    return config


def test_every_step_speaks_of_every_bucket(pipeline, tokens):
    assert "60 samples in 3 shards (20 of 8x8, 20 of 12x8, 20 of 8x16)" in act(pipeline, "finalise").summary
    assert "1 units with 60 samples are sound" in act(pipeline, "verify").summary
    assert "1 of 1 done" in act(pipeline, "status").summary and act(pipeline).skipped
    shown = act(pipeline, "stats").summary
    assert all(f"{name}:" in shown for name in BUCKETS) and shown.count("samples: 20") == 3
    assert all((tokens / name / "sheet.png").exists() and (tokens / name / "stats.json").exists() for name in BUCKETS)
    streams = TokenDataset(tokens / "12x8").manifest.streams
    assert streams["codes"].code_shape == (4, 6) and streams["codes.low"].code_shape == (2, 3)


def test_the_square_bucket_is_what_the_tokenizer_alone_would_give(pipeline, tokens):
    plain = load_image_tokenizer(pipeline / "image_tokenizer")
    TokenDataset(tokens / "8x8").require({"codes": plain})
    with pytest.raises(DataError, match=r"for codes of 4 x 6, but this run uses .* for codes of 4 x 4"):
        TokenDataset(tokens / "12x8").require({"codes": plain})
    TokenDataset(tokens / "12x8").require({"codes": plain.resized((8, 12))})


def test_damage_in_one_bucket_is_invalidated_in_all_and_made_again(pipeline, tmp_path):
    tokens = tmp_path / "tokens"
    act(pipeline, tokens=tokens)
    path = tokens / "8x16" / "tokens-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-700] + bytes([whole[-700] ^ 1]) + whole[-699:])
    with pytest.raises(DataError, match=r"8x16/tokens-000000\.tar: its sha256"):
        act(pipeline, "verify", tokens=tokens, repair=True)
    assert not list(tokens.rglob("tokens-*.json"))
    act(pipeline, tokens=tokens)
    assert path.read_bytes() == whole and "sound" in act(pipeline, "verify", tokens=tokens).summary


def test_a_model_of_one_bucket_trains_is_exported_and_draws_its_shape(pipeline, tokens, tmp_path):
    config = trained(pipeline, tmp_path / "run", tokens / "12x8")
    exported = tmp_path / "run" / "export"
    keys = {"run_dir": config.run_dir, "image_tokenizer": pipeline / "image_tokenizer"}
    export.run(decode(export.CONFIG, keys), ALONE)
    model = load_pretrained(exported)
    assert model.config.image_grid == (4, 6)
    assert model.image_tokenizer.fingerprint == TokenDataset(tokens / "12x8").manifest.streams["codes"].tokenizer
    assert model.sample(tiny_pipeline.CAPTIONS[:2]).shape == (2, 3, 8, 12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"buckets": ("8",)}, r"buckets: .*'8' is no bucket; give width x height in pixels"),
        ({"buckets": ("8x0",)}, r"buckets: .*'8x0' is no bucket"),
        ({"buckets": ("../8x8",)}, r"buckets: .* is no bucket"),
        ({"buckets": ("8x8", "12x8", "8x8")}, r"buckets: .*8x8 is named twice"),
        ({"buckets": ("8x8", "11x8"), "streams": {}}, r"buckets: 11x8, stream codes: .* give multiples of 2"),
        ({"buckets": ("10x8",)}, r"buckets: 10x8, stream codes\.low: images of 5x4"),
        ({"buckets": ("10x8",), "streams": {"low": THREE_QUARTERS}}, r"buckets: 10x8 is no whole .* stream codes\.low"),
    ],
)
def test_bad_buckets_are_refused(pipeline, tmp_path, changes, words):
    if low := changes.get("streams", {}).get("low"):
        changes = changes | {"streams": {"low": low | {"path": pipeline / "image_tokenizer"}}}
    with pytest.raises(ConfigError, match=words):
        act(pipeline, tokens=tmp_path, **changes)
