"""Several shapes of images in one stream: the order over them, against one that enumerates, and the loader on top."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_folders import LetterTokenizer, make_tokens

from tokscale.base.errors import ConfigError, DataError
from tokscale.base.rng import seed_of
from tokscale.data.loading import SourceConfig, TokenLoader, TokenLoaderConfig, open_sources
from tokscale.data.loading.held_out import SplitConfig
from tokscale.data.loading.shapes import ShapeOrder
from tokscale.data.tokens.manifest import StreamRecord, TokenDataset

B = 6
SIZES = {"12x8": (2, 3), "8x12": (3, 2), "8x8": (2, 2)}
BLOCKS = {"12x8": [4, 4, 3], "8x12": [4, 1], "8x8": [4, 4, 4, 4, 4, 1]}
"""11, 5 and 21 samples: none is a multiple of the batch, and one is less than a batch."""


def splitmix(value: int) -> int:
    """The hash of the order, in whole numbers of any size."""
    z = (value + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


def enumerated(samples: Sequence[int], batch: int, seed: int, *, shuffle: bool) -> Iterator[tuple[int, int]]:
    """Batch by batch, the shape and which of its batches: samples are counted one by one, batches given when full."""
    waiting, given = [0] * len(samples), [0] * len(samples)
    for epoch in itertools.count():
        full = []
        for shape, count in enumerate(samples):
            for _ in range(count):
                waiting[shape] += 1
                if waiting[shape] == batch:
                    full.append(shape)
                    waiting[shape] = 0
        if shuffle:
            key = seed_of(seed, "order", "shapes", epoch)
            full = [full[place] for place in sorted(range(len(full)), key=lambda place: splitmix(place ^ key))]
        for shape in full:
            yield shape, given[shape]
            given[shape] += 1


@given(
    samples=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    batch=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_order_over_shapes_is_the_enumeration_that_its_page_describes(samples, batch, seed, shuffle):
    wanted = list(itertools.islice(enumerated(samples, batch, seed, shuffle=shuffle), 60))
    order = ShapeOrder(samples, batch_size=batch, seed=seed, shuffle=shuffle)
    assert [order.batch(number) for number in range(60)] == wanted
    # It is a function of the number alone: asked backwards, by another one, it says the same.
    again = ShapeOrder(samples, batch_size=batch, seed=seed, shuffle=shuffle)
    assert [again.batch(number) for number in reversed(range(60))] == wanted[::-1]


def test_a_far_batch_is_found_without_walking_there():
    order = ShapeOrder([10**9 + 1, 7, 10**6], batch_size=1024, seed=1)
    shape, number = order.batch(10**4)
    assert shape in (0, 2) and number <= 10**4
    few = ShapeOrder([1, 2], batch_size=512, seed=1)
    assert [few.batch(at)[1] for at in (10**9, 10**9 + 1, 10**9 + 2)] != [0, 0, 0]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    for number, (name, grid) in enumerate(SIZES.items()):
        stream = StreamRecord(tokenizer=name[0] * 64, num_tokens=60_000, code_shape=grid, image_size=8)
        make_tokens(folder / name, BLOCKS[name], streams={"codes": stream}, first=1000 * number, shards=1)
    return folder


def loaders(tokens: Path, world: int, *, batch_size: int = B, **changes: Any) -> list[TokenLoader]:
    config = TokenLoaderConfig(**{"sources": (SourceConfig(path=tokens),), "window": 2, "prefetch": 2} | changes)
    options = {"text_tokenizer": LetterTokenizer(), "text_length": 8, "batch_size": batch_size, "seed": 3}
    datasets = open_sources(config, tokens)
    return [
        TokenLoader(config, manifests=datasets, comm_rank=rank, comm_world=world, **options) for rank in range(world)
    ]


def held_out_loader(tokens: Path, **changes: Any) -> TokenLoader:
    config = TokenLoaderConfig(**{"sources": (SourceConfig(path=tokens),), "shuffle": False, "prefetch": 0} | changes)
    datasets = open_sources(config, tokens)
    return TokenLoader(config, manifests=datasets, text_tokenizer=None, batch_size=B, seed=3, held_out=True)


def batches(ranks: Sequence[TokenLoader], steps: int) -> list[tuple[Any, ...]]:
    """What all ranks together are given: shape, positions, keys, codes, captions."""
    found = []
    for _ in range(steps):
        own = [rank.next_batch() for rank in ranks]
        (grid,) = {tuple(batch.codes.shape[1:]) for batch in own}  # at each step, every rank has the same shape
        codes, text = torch.cat([batch.codes for batch in own]), torch.cat([batch.text for batch in own])
        keys = [key for batch in own for key in batch.keys]
        found.append(
            (grid, torch.cat([batch.positions for batch in own]).tolist(), keys, codes.tolist(), text.tolist())
        )
    for rank in ranks:
        rank.close()
    return found


def test_a_batch_is_of_one_shape_and_every_sample_comes_once_before_any_comes_again(tokens):
    found = batches(loaders(tokens, 1), 60)
    assert {grid for grid, *_ in found} == set(SIZES.values())
    assert [at for _, positions, *_ in found for at in positions] == list(range(60 * B))
    for grid, blocks in zip(SIZES.values(), BLOCKS.values(), strict=True):
        keys = [key for shape, _, keys, *_ in found if shape == grid for key in keys]
        count = sum(blocks)
        assert len(keys) > 2 * count
        for start in range(0, len(keys) - count, count):
            assert len(set(keys[start : start + count])) == count
    # 37 samples are 6 batches and one sample: of three epochs, each shape has had what fills batches.
    shapes = Counter(grid for grid, *_ in found[: 33 // B + 15 // B + 63 // B])
    assert shapes == {(2, 3): 33 // B, (3, 2): 15 // B, (2, 2): 63 // B}


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_stream_is_the_same_at_any_world_size_and_after_any_interruption(tokens, world):
    whole = batches(loaders(tokens, 1), 24)
    ranks = loaders(tokens, world)
    got = batches(ranks, 7)
    states = [rank.state_dict() for rank in ranks]
    assert states == [states[0]] * world and states[0]["position"] == 7 * B
    others = loaders(tokens, 3 if world == 2 else 2)
    for rank in others:
        rank.load_state_dict(states[0])
    assert got + batches(others, 17) == whole


def test_one_bucket_alone_is_read_as_the_data_set_that_it_is(tokens):
    alone = SourceConfig(path=tokens / "8x8")
    plain = loaders(tokens, 1, sources=(alone,))
    picked = loaders(tokens, 1, sources=(SourceConfig(path=tokens, buckets=("8x8",)),))
    assert "shapes" not in picked[0].state_dict() and picked[0].state_dict() == plain[0].state_dict()
    direct = TokenLoader(
        TokenLoaderConfig(window=2),
        manifests=[TokenDataset(tokens / "8x8")],
        text_tokenizer=LetterTokenizer(),
        text_length=8,
        batch_size=B,
        seed=3,
    )
    assert batches(plain, 9) == batches(picked, 9) == batches([direct], 9)


def test_a_shape_of_which_nothing_is_held_out_is_trained_on_and_not_measured(tokens):
    config = {"held_out": SplitConfig(share=0.01)}
    (trained,) = loaders(tokens, 1, **config)
    measured = held_out_loader(tokens, **config)
    parts = [{key for _ in range(9) for key in loader.next_batch().keys} for loader in measured.by_shape()]
    seen = {key for _, _, keys, *_ in batches([trained], 60) for key in keys}
    assert sorted(map(len, parts)) == [1, 1]  # of 11 and 21; of the 5 of the rare shape none
    assert not seen & set.union(*parts)
    assert len(seen) + sum(map(len, parts)) == 37
    with pytest.raises(DataError, match=r"held_out\.share=1e-09 holds no sample out"):
        held_out_loader(tokens, held_out=SplitConfig(share=1e-9))


def test_weights_are_shares_of_samples_whatever_the_shapes(tokens):
    sources = [SourceConfig(path=tokens / name, weight=weight) for name, weight in (("12x8", 3), ("8x8", 1))]
    found = Counter(grid for grid, *_ in batches(loaders(tokens, 1, sources=tuple(sources)), 64))
    assert abs(found[2, 3] - 48) <= 4 and found[2, 3] + found[2, 2] == 64


def test_the_batch_size_and_the_data_are_parts_of_the_order(tokens):
    (loader,) = loaders(tokens, 1)
    state = loader.state_dict()
    with pytest.raises(DataError, match="batch_size=6, this run has 4"):
        loaders(tokens, 1, batch_size=4)[0].load_state_dict(state)
    fewer = loaders(tokens, 1, sources=(SourceConfig(path=tokens, buckets=("8x8", "12x8")),))[0]
    with pytest.raises(DataError, match="a run of several shapes of images keeps its data"):
        fewer.load_state_dict(state)
    with pytest.raises(DataError, match="a run of several shapes of images keeps its data"):
        loaders(tokens, 1, sources=(SourceConfig(path=tokens / "8x8"),))[0].load_state_dict(state)


def test_what_a_stream_of_several_shapes_cannot_do_is_refused(tokens):
    with pytest.raises(ConfigError, match=r"on_change=segment: a run of several shapes"):
        loaders(tokens, 1, on_change="segment")
    with pytest.raises(DataError, match=r"has no bucket '8x9'; did you mean '8x8'"):
        loaders(tokens, 1, sources=(SourceConfig(path=tokens, buckets=("8x9",)),))
    with pytest.raises(ConfigError, match="a data set is named twice"):
        loaders(tokens, 1, sources=(SourceConfig(path=tokens), SourceConfig(path=tokens / "8x8")))
