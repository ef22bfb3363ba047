"""The loader: the same global batches whatever the number of ranks, interruptions, mixtures, views and partitions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_folders import LetterTokenizer, make_tokens, record

from tokscale.base.errors import ConfigError, DataError
from tokscale.data.loading import SourceConfig, TokenLoader, TokenLoaderConfig
from tokscale.data.loading.collate import Picker
from tokscale.data.tokens.manifest import TextRecord, TokenDataset
from tokscale.data.tokens.views import ViewRule, build_view

B = 12


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> TokenDataset:
    return make_tokens(tmp_path_factory.mktemp("ragged"), blocks=[4, 4, 3, 4, 1, 4, 4, 2, 4, 4], shards=3)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> TokenDataset:
    return make_tokens(tmp_path_factory.mktemp("other"), blocks=[3, 3, 1], shards=1, first=500)


def loaders(datasets: Sequence[TokenDataset], world: int, config: TokenLoaderConfig, **options: Any):
    options = {"batch_size": B, "seed": 3, "text_tokenizer": LetterTokenizer(), "text_length": 8} | options
    return [
        TokenLoader(config, manifests=datasets, comm_rank=rank, comm_world=world, **options) for rank in range(world)
    ]


def global_batches(ranks: Sequence[TokenLoader], steps: int) -> list[tuple[Any, ...]]:
    """What all ranks together were given: positions, keys, codes and captions, step by step."""
    found = []
    for _ in range(steps):
        batches = [rank.next_batch() for rank in ranks]
        found.append(
            (
                torch.cat([batch.positions for batch in batches]).tolist(),
                [key for batch in batches for key in batch.keys],
                torch.cat([batch.codes for batch in batches]).tolist(),
                torch.cat([batch.text for batch in batches]).tolist(),
                torch.cat([batch.text_mask for batch in batches]).tolist(),
            )
        )
    for rank in ranks:
        rank.close()
    return found


quiet = TokenLoaderConfig(window=3, prefetch=0)


def test_a_batch_holds_what_was_stored(ragged):
    loader = loaders([ragged], 1, quiet)[0]
    batch = loader.next_batch()
    assert batch.positions.tolist() == list(range(B)) and batch.codes.dtype == torch.int64
    for row, key in enumerate(batch.keys):
        assert batch.codes[row].unique().tolist() == [int(key)]
        caption = "".join(chr(i) for i in batch.text[row][batch.text_mask[row]].tolist())
        assert caption in (f"{key}/0", f"{key}/1")


@given(
    world=st.sampled_from([1, 2, 3, 4]),
    cuts=st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 6])), max_size=3),
    window=st.sampled_from([2, 3, 12]),
    prefetch=st.sampled_from([0, 2]),
)
@settings(max_examples=8, deadline=None)
def test_interruptions_and_other_world_sizes_change_nothing(ragged, world, cuts, window, prefetch):
    config = TokenLoaderConfig(window=window, prefetch=prefetch)
    whole = global_batches(loaders([ragged], 1, config), 8)
    ranks, got = loaders([ragged], world, config), []
    for steps, next_world in cuts:
        got += global_batches(ranks, steps)
        states = [rank.state_dict() for rank in ranks]
        assert all(state == states[0] for state in states)
        ranks = loaders([ragged], next_world, config)
        for rank in ranks:
            rank.load_state_dict(states[0])
    got += global_batches(ranks, max(0, 8 - len(got)))
    assert got[:8] == whole


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_world_size_reads_each_sample_once_per_epoch(ragged, world):
    keys: list[str] = []
    for _, batch_keys, *_ in global_batches(loaders([ragged], world, quiet, batch_size=world * 5), 110 // (world * 5)):
        keys += batch_keys
    epoch = ragged.samples
    for start in range(0, len(keys) - epoch, epoch):
        assert sorted(keys[start : start + epoch], key=int) == [str(n) for n in range(epoch)]


def test_the_global_batch_may_change_in_the_middle(ragged):
    first = loaders([ragged], 1, quiet)[0]
    keys = [key for _ in range(5) for key in first.next_batch().keys]  # 60 samples: no multiple of 7
    second = loaders([ragged], 1, quiet, batch_size=7)[0]
    second.load_state_dict(first.state_dict())
    keys += [key for _ in range(5) for key in second.next_batch().keys]
    reference = loaders([ragged], 1, quiet, batch_size=95)[0].next_batch()
    assert keys == list(reference.keys)


def test_captions_and_variants_are_chosen_by_position(tmp_path):
    dataset = make_tokens(tmp_path, blocks=[50] * 4, shards=1, captions=3, variants=2)
    batch = loaders([dataset], 1, quiet, batch_size=400)[0].next_batch()
    number = torch.tensor([int(key) for key in batch.keys])
    variant = (batch.codes[:, 0, 0] - number) // 1000
    caption = [LetterTokenizer().decode(row[None])[0].split("/")[1] for row in batch.text]
    assert set(variant.tolist()) == {0, 1} and 120 < int(variant.sum()) < 280
    assert {word: 90 < caption.count(word) < 180 for word in "012"} == dict.fromkeys("012", True)
    other = loaders([dataset], 1, quiet, batch_size=400, seed=4)[0].next_batch()
    assert batch.codes.tolist() != other.codes.tolist()


def test_another_seed_chooses_other_captions_and_variants_of_the_same_positions(tmp_path):
    block = make_tokens(tmp_path, blocks=[200], shards=1, captions=4).read(0)
    positions, rows = torch.arange(200), np.arange(200)

    def chosen(seed: int) -> list[list[int]]:
        picker = Picker(seed)
        captions = picker.captions(block, rows, positions) - 4 * rows
        return [captions.tolist(), picker.variants(positions, 4).tolist()]

    for first, same, other in zip(chosen(3), chosen(3), chosen(4), strict=True):
        assert first == same and {0, 1, 2, 3} == set(first)
        assert 100 < sum(a != b for a, b in zip(first, other, strict=True)) < 190


def test_caption_weights(tmp_path):
    dataset = make_tokens(tmp_path, blocks=[50] * 4, shards=1, captions=2)
    config = TokenLoaderConfig(prefetch=0, caption_weights=(0.2, 0.8))
    batch = loaders([dataset], 1, config, batch_size=1000)[0].next_batch()
    second = sum(caption.endswith("/1") for caption in LetterTokenizer().decode(batch.text))
    assert 750 < second < 850
    only_first = TokenLoaderConfig(prefetch=0, caption_weights=(1.0, 0.0))
    batch = loaders([dataset], 1, only_first, batch_size=200)[0].next_batch()
    assert all(caption.endswith("/0") for caption in LetterTokenizer().decode(batch.text))


def test_images_without_captions_have_empty_texts(tmp_path):
    batch = loaders([make_tokens(tmp_path, captions=0)], 1, quiet)[0].next_batch()
    assert not batch.text_mask.any()
    batch = loaders([make_tokens(tmp_path)], 1, quiet, text_tokenizer=None)[0].next_batch()
    assert batch.text.shape == (B, 0)


def test_stored_ids_are_used_when_they_are_the_tokenizers_own(tmp_path, ragged):
    tokenizer = LetterTokenizer()
    text = TextRecord(tokenizer="letters", num_tokens=256, length=8)
    dataset = make_tokens(tmp_path, text=text)
    batch = loaders([dataset], 1, quiet, text_tokenizer=tokenizer)[0].next_batch()
    assert tokenizer.calls == 0
    assert all(
        caption.split("/")[0] == key for caption, key in zip(tokenizer.decode(batch.text), batch.keys, strict=True)
    )
    loaders([dataset], 1, quiet, text_tokenizer=tokenizer, text_length=4)[0].next_batch()
    assert tokenizer.calls == 1  # stored at another length: encoded afresh


def test_further_streams_come_as_extra(tmp_path):
    dataset = make_tokens(tmp_path, streams={"codes": record(), "codes.low": record("e" * 64)})
    config = TokenLoaderConfig(prefetch=0, streams=("codes.low",))
    batch = loaders([dataset], 1, config)[0].next_batch()
    assert torch.equal(batch.extra["codes.low"], batch.codes)
    with pytest.raises(DataError, match=r"no stream 'codes.high', only codes, codes.low"):
        loaders([dataset], 1, TokenLoaderConfig(streams=("codes.high",)))


def mixed(paths: Sequence[Path], weights: Sequence[float], **options: Any) -> TokenLoaderConfig:
    sources = tuple(SourceConfig(path=path, weight=weight) for path, weight in zip(paths, weights, strict=True))
    return TokenLoaderConfig(sources=sources, window=2, prefetch=0, **options)


def test_mixtures_are_exact_at_any_world_size_and_cut(ragged, other):
    config = mixed([ragged.folder, other.folder], [3, 1])
    whole = global_batches(loaders([ragged, other], 1, config), 30)
    ranks = loaders([ragged, other], 4, config)
    got = global_batches(ranks, 11)
    state = ranks[0].state_dict()
    ranks = loaders([ragged, other], 3, config)
    for rank in ranks:
        rank.load_state_dict(state)
    assert got + global_batches(ranks, 19) == whole
    keys = [key for _, batch_keys, *_ in whole for key in batch_keys]
    from_other = [key for key in keys if int(key) >= 500]
    assert 60 < len(from_other) < 120
    for start in range(0, len(from_other) - 7, 7):  # each source keeps its own epochs
        assert len(set(from_other[start : start + 7])) == 7


def test_changed_weights_are_refused_or_recorded(ragged, other):
    before = loaders([ragged, other], 1, mixed([ragged.folder, other.folder], [3, 1]))[0]
    seen = [key for _ in range(4) for key in before.next_batch().keys]
    state = before.state_dict()
    with pytest.raises(DataError, match=r"data sets and weights .*on_change=segment"):
        loaders([ragged, other], 1, mixed([ragged.folder, other.folder], [1, 1]))[0].load_state_dict(state)
    with pytest.raises(DataError, match="data sets and weights"):
        loaders([ragged], 1, mixed([ragged.folder], [1]))[0].load_state_dict(state)

    config = mixed([ragged.folder, other.folder], [1, 1], on_change="segment")
    after = loaders([ragged, other], 1, config)[0]
    after.load_state_dict(state)
    seen += [key for _ in range(4) for key in after.next_batch().keys]
    assert [segment["start"] for segment in after.state_dict()["segments"]] == [0, 48]
    of_other = [key for key in seen if int(key) >= 500]
    assert len(set(of_other[:7])) == 7  # the epoch of a source that stays goes on over the change
    again = loaders([ragged, other], 1, config)[0]  # and a resume in the new segment is no change
    again.load_state_dict(after.state_dict())
    assert again.next_batch().keys == after.next_batch().keys
    assert len(again.state_dict()["segments"]) == 2


@pytest.mark.parametrize("option,value", [("seed", 9), ("window", 5), ("shuffle", False)])
def test_another_order_is_refused(ragged, option, value):
    state = loaders([ragged], 1, quiet)[0].state_dict()
    config = quiet.model_copy(update={} if option == "seed" else {option: value})
    changed = loaders([ragged], 1, config, **({"seed": value} if option == "seed" else {}))[0]
    with pytest.raises(DataError, match=f"{option}=.*set {option} as it was"):
        changed.load_state_dict(state)


def test_another_order_version_is_refused(ragged):
    loader = loaders([ragged], 1, quiet)[0]
    with pytest.raises(DataError, match="order_version=0"):
        loader.load_state_dict(loader.state_dict() | {"order_version": 0})


def test_partitions_keep_ranks_to_their_own_blocks(tmp_path):
    dataset = make_tokens(tmp_path, blocks=[4] * 12, shards=1)
    config = TokenLoaderConfig(window=2, prefetch=0, partitions=4)
    whole = global_batches(loaders([dataset], 1, config), 12)
    for world in (2, 3, 4):
        assert global_batches(loaders([dataset], world, config), 12) == whole
    ranks = loaders([dataset], 4, config)
    blocks = [{int(key) // 4 for _ in range(12) for key in rank.next_batch().keys} for rank in ranks]
    assert all(not blocks[a] & blocks[b] for a in range(4) for b in range(a)) and set().union(*blocks) == set(range(12))
    state = ranks[0].state_dict()
    with pytest.raises(DataError, match="batch_size=12"):  # with partitions the batch size is part of the order
        loaders([dataset], 4, config, batch_size=24)[0].load_state_dict(state)


def test_views_leave_out_rows_and_are_a_data_set_of_their_own(tmp_path):
    dataset = make_tokens(tmp_path, blocks=[5] * 6, shards=2)
    build_view(dataset, "later", ViewRule(min_scores={"aesthetic": 12.0}))
    config = TokenLoaderConfig(sources=(SourceConfig(path=tmp_path, view="later"),), window=2, prefetch=0)
    whole = global_batches(loaders([dataset], 1, config, batch_size=18), 3)
    for _, keys, *_ in whole:  # 18 of 30 samples: each batch is one epoch
        assert sorted(int(key) for key in keys) == list(range(12, 30))
    assert global_batches(loaders([dataset], 3, config, batch_size=18), 3) == whole
    state = loaders([dataset], 1, config)[0].state_dict()
    unfiltered = config.model_copy(update={"sources": ()})
    with pytest.raises(DataError, match="data sets and weights"):
        loaders([dataset], 1, unfiltered)[0].load_state_dict(state)


def damage(dataset: TokenDataset, shard: int, at: int) -> None:
    path = dataset.folder / dataset.manifest.shards[shard].file
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_bad_block_is_an_error_that_names_it(tmp_path):
    dataset = make_tokens(tmp_path, shards=1)
    damage(dataset, 0, 1024 + 512 + 600)
    with pytest.raises(DataError, match=r"tokens-000000\.tar: block at byte .*checksum.*action=verify"):
        for _ in range(3):
            loaders([dataset], 1, quiet)[0].next_batch()


def test_a_bad_block_may_be_substituted_without_shifting_any_other_position(tmp_path):
    config = TokenLoaderConfig(window=2, prefetch=0, on_bad_block="substitute", max_bad_blocks=1)
    dataset = make_tokens(tmp_path, shards=1)
    whole = loaders([dataset], 1, config, batch_size=16)[0].next_batch().keys
    damage(dataset, 0, 1024 + 512 + 600)
    ranks = loaders([TokenDataset(tmp_path)], 2, config, batch_size=16)
    got = [key for rank in ranks for key in rank.next_batch().keys]
    changed = {a for a, b in zip(whole, got, strict=True) if a != b}
    assert changed == {"0", "1", "2", "3"}
    assert {b for a, b in zip(whole, got, strict=True) if a != b} <= {"4", "5", "6", "7"}

    strict = config.model_copy(update={"max_bad_blocks": 0})
    with pytest.raises(DataError, match="checksum"):
        loaders([TokenDataset(tmp_path)], 1, strict, batch_size=16)[0].next_batch()


def test_a_substitute_shorter_than_the_damaged_block_repeats_its_rows(tmp_path):
    dataset = make_tokens(tmp_path, blocks=(5, 2, 5), shards=1)
    config = TokenLoaderConfig(window=3, prefetch=0, on_bad_block="substitute", max_bad_blocks=1)
    whole = loaders([dataset], 1, config, batch_size=12)[0].next_batch()
    damage(dataset, 0, 1024 + 512 + 600)
    got = loaders([TokenDataset(tmp_path)], 1, config, batch_size=12)[0].next_batch()
    changed = {int(a): int(b) for a, b in zip(whole.keys, got.keys, strict=True) if a != b}
    assert changed == {0: 5, 1: 6, 2: 5, 3: 6, 4: 5}


def test_a_missing_shard_is_an_error_in_the_training_thread(tmp_path):
    dataset = make_tokens(tmp_path)
    (tmp_path / "tokens-000001.tar").unlink()
    loader = loaders([dataset], 1, TokenLoaderConfig(prefetch=2))[0]
    with pytest.raises(DataError, match="the shard is missing"):
        for _ in range(3):
            loader.next_batch()
    loader.close()


def test_refused_combinations(ragged, other, tmp_path):
    with pytest.raises(ConfigError, match="does not divide among 5 ranks"):
        loaders([ragged], 5, quiet)
    with pytest.raises(ConfigError, match="partitions need a single one"):
        loaders([ragged, other], 1, mixed([ragged.folder, other.folder], [1, 1], partitions=2))
    with pytest.raises(ConfigError, match="named twice"):
        loaders([ragged, ragged], 1, mixed([ragged.folder, ragged.folder], [1, 1]))
    foreign = make_tokens(tmp_path, streams={"codes": record("e" * 64)})
    with pytest.raises(DataError, match=r"eeeeeeeeeeee.*ffffffffffff"):
        loaders([ragged, foreign], 1, mixed([ragged.folder, tmp_path], [1, 1]))


def test_the_whole_is_one_epoch(ragged):
    assert loaders([ragged], 1, quiet)[0].samples == 34
