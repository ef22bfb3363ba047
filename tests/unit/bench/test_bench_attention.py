"""`bench attention` on sizes too small to mean anything: its rows, not its metrics."""

import pytest
import torch

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.bench.attention import AttentionBench, rows
from tokscale.bench.measure import interleaved, peak_bytes, row

TINY = {"text": 4, "grids": [4], "batches": [1], "heads": 2, "dim_head": 8, "rounds": 1, "sparse": {"kind": "dense"}}
TINY |= {"originals": False}


def test_every_kind_has_its_rows():
    found = list(
        rows(decode(AttentionBench, TINY | {"decode_depth": 1, "decode_positions": [6, 9], "decode_batches": [2]}))
    )
    names = [entry["name"] for entry in found]
    assert len(set(names)) == len(names)
    for kind in ("full", "axial_row", "axial_col", "conv_like", "sparse"):
        assert f"attention/{kind}/1x4+4x4/fp32/sdpa/vs-sdpa/time" in names
        assert f"attention/decode-{kind}-at-9/2x4+4x4/fp32/vs-cheapest/time" in names
        assert f"attention/sample-{kind}-1-layers/2x4+4x4/fp32/vs-recomputed/time" in names
    for entry in found:
        assert set(entry) == {"name", "ours", "baseline", "unit", "ratio", "target"}
        assert entry["ours"] > 0 and entry["ratio"] == pytest.approx(entry["baseline"] / entry["ours"])


def test_a_grid_without_a_batch_size_is_refused():
    with pytest.raises(ConfigError, match="batches: got 1 sizes for 2 grids"):
        decode(AttentionBench, TINY | {"grids": [4, 8]})


def test_sides_are_interleaved_and_a_first_round_is_not_counted():
    order: list[str] = []
    threads: list[int] = []

    def side(name: str):
        return lambda: (order.append(name), threads.append(torch.get_num_threads()))

    before = torch.get_num_threads()
    assert set(interleaved({"a": side("a"), "b": side("b")}, 2)) == {"a", "b"}
    assert order == ["a", "b"] * 3
    assert set(threads) == {1} and torch.get_num_threads() == before


def test_peak_memory_is_what_a_call_adds():
    held = []

    def call() -> None:
        held.clear()
        held.append(torch.ones(16_000_000))  # 64 MB
        held.clear()

    peak = peak_bytes(call)
    assert peak is None or 60e6 < peak < 75e6


def test_a_ratio_above_one_is_better_for_costs_and_for_speeds():
    assert row("a", 2.0, 6.0, "ms")["ratio"] == 3.0
    assert row("a", 2.0, 6.0, "TFLOP/s", more_is_better=True)["ratio"] == pytest.approx(1 / 3)
