"""`bench data` and `bench tokenize` measure what their rows say, on sizes that take a moment."""

import numpy as np
import pytest

from tokscale.bench import data, tokenize
from tokscale.bench.data import DataBench
from tokscale.bench.tokenize import TokenizeBench
from tokscale.data.loading.stock import stock_rows, write_stock_rows
from tokscale.data.tokens.manifest import TokenDataset

ROW = {"name", "ours", "baseline", "unit", "ratio", "target"}


def test_data_rows(tmp_path):
    config = DataBench(
        samples=256,
        codes=16,
        batch_size=50,
        stock_samples=100,
        resume_samples=5000,
        order_samples=100_000,
        memory_samples=200,
        rounds=1,
        folder=tmp_path,
    )
    found = list(data.rows(config))
    assert [entry["name"] for entry in found[:3]] == [
        "data/shuffled/0.256k-x-16/vs-webdataset/time",
        "data/sequential/0.256k-x-16/vs-webdataset/time",
        "data/bytes/0.256k-x-16/vs-webdataset/memory",
    ]
    assert all(entry.keys() == ROW and entry["ours"] > 0 and entry["baseline"] > 0 for entry in found)
    assert found[2]["ratio"] > 4  # bytes are no matter of timing
    assert not list(tmp_path.iterdir())


def test_both_sides_hold_the_same_content(tmp_path):
    config = DataBench(samples=300, codes=16)
    samples = list(data._samples(config))
    data._write_blocks(tmp_path / "tokens", config, samples)
    write_stock_rows(tmp_path / "rows.tar", ((s.key, s.codes["codes"], s.captions[0]) for s in samples))
    dataset = TokenDataset(tmp_path / "tokens")
    stored = data._loader(config, dataset, shuffle=False).read(0, 300)
    codes, captions = zip(*stock_rows(tmp_path / "rows.tar", 100, shuffle=False), strict=True)
    assert np.concatenate(codes).tolist() == stored.codes["codes"].tolist()
    assert [caption for batch in captions for caption in batch] == stored.captions


def test_tokenize_rows(tmp_path):
    config = TokenizeBench(
        images=64, source_side=64, image_size=32, encode_batch=16, memory_images=200, rounds=1, folder=tmp_path
    )
    found = list(tokenize.rows(config))
    assert [entry["name"].split("/")[1] for entry in found] == [
        "decode",
        "decode",
        "decode-bound",
        "encode-bound",
        "memory-after",
    ]
    assert all(entry.keys() == ROW and entry["ours"] > 0 for entry in found)
    assert found[1]["ours"] == pytest.approx(1, abs=1)  # at most one grey level from Pillow, also at this size
    assert found[3]["ratio"] < 1.05  # nothing encodes faster than the encoder alone


def test_rows_come_as_they_are_measured(tmp_path, monkeypatch):
    config = TokenizeBench(images=64, source_side=32, image_size=16, rounds=1, folder=tmp_path)
    monkeypatch.setattr(tokenize, "_bounds", lambda *_: 1 / 0)
    found = tokenize.rows(config)
    assert [next(found)["name"] for _ in range(2)] == [
        "tokenize/decode/32-to-16/vs-pillow/time",
        "tokenize/decode/32-to-16/vs-1-grey-level",
    ]
    with pytest.raises(ZeroDivisionError):
        next(found)
