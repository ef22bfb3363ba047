"""The canonical order: pinned for ever, exact per epoch, equal on any number of ranks."""

import hashlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokscale.base.errors import ConfigError, DataError
from tokscale.base.rng import seed_of
from tokscale.data.loading.order import BlockOrder

RAGGED = torch.tensor([256 if i % 7 else 1 + i % 250 for i in range(782)])

sizes_of = st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(lambda sizes: sum(sizes) > 0)


def samples(order: BlockOrder, start: int, stop: int) -> list[tuple[int, int]]:
    blocks, rows = order.locate(start, stop)
    return list(zip(blocks.tolist(), rows.tolist(), strict=True))


def test_the_order_is_pinned_for_ever():
    # A checkpoint of last year must go on with the data that it has not seen: change ORDER_VERSION with this hash.
    blocks, rows = BlockOrder(RAGGED, seed=7).locate(0, 10_000)
    packed = torch.stack([blocks, rows], 1).to(torch.int64).numpy().astype("<i8").tobytes()
    assert hashlib.sha256(packed).hexdigest() == "f33606e380c0fa34cb13c0565016d544a4886507c32f9eaeb31a53df6eb506e0"


def test_the_order_of_partitions_is_pinned_for_ever_and_dealt_by_the_seed():
    order = BlockOrder(RAGGED, seed=7, partitions=4, batch_size=64)
    blocks, rows = order.locate(0, 10_000)
    packed = torch.stack([blocks, rows], 1).to(torch.int64).numpy().astype("<i8").tobytes()
    assert hashlib.sha256(packed).hexdigest() == "c3e39faebffdf98d57f8858759704c359dc37f27bc60739466afe703789243ce"
    dealt = [set(blocks.tolist()) for blocks in order._partition_blocks if blocks is not None]
    other = BlockOrder(RAGGED, seed=8, partitions=4, batch_size=64)._partition_blocks[0]
    assert other is not None and dealt[0] != set(other.tolist())


@pytest.mark.parametrize("piece", [1, 7, 24])
def test_partitioned_positions_are_the_same_in_whatever_pieces_they_are_read(piece):
    order = BlockOrder(torch.arange(1, 30), seed=3, window=3, partitions=2, batch_size=12)
    whole = samples(order, 0, 168)
    assert [one for start in range(0, 168, piece) for one in samples(order, start, start + piece)] == whole


@given(sizes=sizes_of, window=st.integers(1, 9), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_epoch_has_every_sample_exactly_once(sizes, window, seed, epoch):
    order = BlockOrder(torch.tensor(sizes), seed=seed, window=window)
    total = sum(sizes)
    seen = samples(order, epoch * total, (epoch + 1) * total)
    assert sorted(seen) == [(block, row) for block, size in enumerate(sizes) for row in range(size)]


def splitmix(value: int) -> int:
    z = (value + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


@given(sizes=sizes_of, window=st.integers(1, 9), seed=st.integers(0, 2**40), epoch=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_the_order_is_the_sort_that_its_page_describes(sizes, window, seed, epoch):
    key = seed_of(seed, "order", "blocks", 0, epoch)
    blocks = sorted(range(len(sizes)), key=lambda block: splitmix(block ^ key))
    expected = []
    for number, start in enumerate(range(0, len(blocks), window)):
        rows = [(block, row) for block in blocks[start : start + window] for row in range(sizes[block])]
        key = seed_of(seed, "order", "rows", 0, epoch, number)
        expected += [rows[place] for place in sorted(range(len(rows)), key=lambda place: splitmix(place ^ key))]
    order = BlockOrder(torch.tensor(sizes), seed=seed, window=window)
    assert samples(order, epoch * len(expected), (epoch + 1) * len(expected)) == expected


@given(sizes=sizes_of, window=st.integers(1, 9), cuts=st.lists(st.integers(0, 150), max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_cut_of_the_stream_gives_the_same_stream(sizes, window, cuts):
    order = BlockOrder(torch.tensor(sizes), seed=3, window=window)
    whole = samples(BlockOrder(torch.tensor(sizes), seed=3, window=window), 0, 150)
    edges = sorted({0, 150, *cuts})
    pieces = [samples(order, low, high) for low, high in pairwise(edges)]
    assert [sample for piece in pieces for sample in piece] == whole
    # and reading backwards, as after a rewind, changes nothing either
    assert [samples(order, low, high) for low, high in pairwise(edges)][::-1] == pieces[::-1]


@given(sizes=sizes_of, partitions=st.sampled_from([2, 3, 4]), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_partitions_are_disjoint_and_exact(sizes, partitions, seed):
    batch = 12
    try:
        order = BlockOrder(torch.tensor(sizes), seed=seed, window=2, partitions=partitions, batch_size=batch)
    except DataError:
        return  # fewer blocks with samples than partitions
    per = batch // partitions
    read: list[list[tuple[int, int]]] = [[] for _ in range(partitions)]
    for start in range(0, 120 * batch, batch):
        rows = samples(order, start, start + batch)
        for partition in range(partitions):
            read[partition] += rows[partition * per : (partition + 1) * per]
    owners = [{block for block, _ in partition} for partition in read]
    assert all(not owners[a] & owners[b] for a in range(partitions) for b in range(a))
    for partition, blocks in zip(read, owners, strict=True):
        own = [(block, row) for block in sorted(blocks) for row in range(sizes[block])]
        assert sorted(partition[: len(own)]) == own


def test_shuffling_mixes_within_windows_and_differs_between_epochs_and_seeds():
    order = BlockOrder(RAGGED, seed=0)
    first, second = samples(order, 0, order.samples), samples(order, order.samples, 2 * order.samples)
    other = samples(BlockOrder(RAGGED, seed=1), 0, order.samples)
    assert len({tuple(first), tuple(second), tuple(other)}) == 3
    # 256 consecutive samples come from many blocks of the window, not from one
    assert len({block for block, _ in first[:256]}) > 48


def test_unshuffled_is_the_stored_order():
    order = BlockOrder(torch.tensor([2, 0, 3]), seed=5, shuffle=False)
    assert samples(order, 0, 6) == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2), (0, 0)]


def test_refusals_name_the_way_out():
    with pytest.raises(DataError, match="0 samples"):
        BlockOrder(torch.tensor([0, 0]), seed=0)
    with pytest.raises(ConfigError, match="partitions=4 does not divide the global batch of 10"):
        BlockOrder(torch.tensor([5] * 9), seed=0, partitions=4, batch_size=10)
    with pytest.raises(ConfigError, match="window=0"):
        BlockOrder(torch.tensor([5]), seed=0, window=0)
