"""Batches split, move and keep every field in step."""

import pytest
import torch

from tokscale.base.batch import TokenBatch


def batch(size: int) -> TokenBatch:
    return TokenBatch(
        positions=torch.arange(size),
        text=torch.arange(size * 3).reshape(size, 3),
        text_mask=torch.ones(size, 3, dtype=torch.bool),
        codes=torch.arange(size * 4).reshape(size, 2, 2),
        keys=[f"{i}" for i in range(size)],
        extra={"lowres": torch.arange(size).reshape(size, 1)},
    )


def test_split_is_in_order_and_loses_nothing():
    parts = batch(6).split(3)
    assert [part.keys for part in parts] == [["0", "1"], ["2", "3"], ["4", "5"]]
    for name in ("positions", "text", "codes"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch(6), name))
    assert parts[2].extra["lowres"].tolist() == [[4], [5]]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="5 samples does not split into 2"):
        batch(5).split(2)


def test_to_moves_tensors_and_leaves_the_rest():
    moved = batch(2).to(torch.device("meta"))
    assert moved.codes.device.type == moved.extra["lowres"].device.type == "meta"
    assert moved.keys == ["0", "1"]
