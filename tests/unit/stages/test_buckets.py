"""Aspect buckets through the whole pipeline: tokenize, train on one of them, export, draw images of its shape."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipeline
from PIL import Image

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError
from tokscale.data.raw.shards import RawRecord, write_shard
from tokscale.data.tokens.manifest import TokenDataset
from tokscale.dist.env import ProcessEnv
from tokscale.inference.pretrained import load_pretrained
from tokscale.stages import export, tokenize, train
from tokscale.tokenizers.image import load_image_tokenizer
from tokscale.tokenizers.text import train_bpe

ALONE = ProcessEnv()
BUCKETS = ("8x8", "12x8", "8x16")
SHAPES = ((9, 9), (10, 15), (17, 8))
"""Rows and columns of images, one shape for each bucket."""
THREE_QUARTERS = {"image_size": 6}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("buckets")
    tiny_pipeline.make_image_tokenizer(folder / "image_tokenizer")
    train_bpe(tiny_pipeline.CAPTIONS, 280, folder / "text_tokenizer")
    values, records = np.random.default_rng(0), []
    for number in range(60):
        stream = io.BytesIO()
        Image.fromarray(values.integers(0, 256, (*SHAPES[number % 3], 3)).astype(np.uint8)).save(stream, "PNG")
        records.append(RawRecord(f"{number:06d}", stream.getvalue(), "png", tiny_pipeline.CAPTIONS[number % 8]))
    write_shard(folder / "data" / "raw" / "00000.tar", records)
    return folder


@pytest.fixture(scope="module")
def tokens(pipeline) -> Path:
    act(pipeline)
    return pipeline / "data" / "tokens"


def act(pipeline: Path, action: str = "all", **changes: Any):
    values = {
        "action": action,
        "data_dir": pipeline / "data",
        "run_dir": pipeline,
        "buckets": BUCKETS,
        "streams": {"low": {"path": pipeline / "image_tokenizer", "image_size": 4}},
        "encode_batch": 4,
        "block_size": 4,
        "work": {"decode_threads": 1},
        "device": "cpu",
    }
    return tokenize.run(decode(tokenize.CONFIG, values | changes), ALONE)


def trained(pipeline: Path, run_dir: Path, *sources: Path) -> train.TrainConfig:
    values = {
        "run_dir": run_dir,
        "data_dir": pipeline / "data",
        "image_tokenizer": pipeline / "image_tokenizer",
        "text_tokenizer": pipeline / "text_tokenizer",
        "model": tiny_pipeline.MODEL,
        "data": {"sources": [{"path": path} for path in sources]},
        "loop": {"total_steps": 2, "log_every": 1},
        "batch_size": 8,
    }
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


def test_buckets_do_not_mix_and_must_be_named(pipeline, tokens, tmp_path):
    with pytest.raises(DataError, match="one shape of images"):
        trained(pipeline, tmp_path, tokens / "12x8", tokens / "8x16")
    with pytest.raises(DataError, match=r"each shape of images, 12x8, 8x16, 8x8.*data\.sources"):
        trained(pipeline, tmp_path)


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
