"""Stored states of a text encoder: what the encoder gives, for each caption by its place, resumable and checked."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from token_folders import make_tokens

from tokscale.base.batch import TEXT_EMBEDS, TEXT_EMBEDS_MASK
from tokscale.base.errors import DataError, StopRequested
from tokscale.data.loading import SourceConfig, TokenLoader, TokenLoaderConfig
from tokscale.data.tokenization.embed import bill, claim_folder, embed_problems, embed_shards
from tokscale.data.tokenization.leases import Leases
from tokscale.data.tokens import files
from tokscale.data.tokens.embeds import EmbedsAbout, EmbedStore
from tokscale.data.tokens.manifest import TokenDataset

BLOCKS = [4, 4, 3, 4, 1, 4]


class LetterEncoder:
    """A state a letter, and one that ends the caption; its values tell the letter and the place."""

    width, precision, length = 2, "fp32", 256

    def __init__(self, fingerprint: str = "letters") -> None:
        self.fingerprint = fingerprint
        self.calls = 0

    def tokenize(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max((len(caption) for caption in captions), default=0) + 1
        ids = torch.tensor([[*map(ord, caption), 1, *[0] * (longest - len(caption) - 1)] for caption in captions])
        return ids.reshape(len(captions), -1), ids.reshape(len(captions), -1) > 0

    def states(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1]).expand_as(ids)
        return torch.stack([ids, places], -1).float() * mask[..., None]

    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        ids, mask = self.tokenize(captions)
        return self.states(ids, mask), mask


ENCODER = LetterEncoder()


def embed(
    dataset: TokenDataset, encoder: LetterEncoder = ENCODER, stop: Any = lambda: False
) -> tuple[int, dict[str, str]]:
    about = EmbedsAbout(
        path=Path("letters"), encoder=encoder.fingerprint, precision="fp32", length=256, width=encoder.width
    )
    claim_folder(dataset.folder, about)
    with Leases(dataset.folder / "embeds", 60) as leases:
        return embed_shards(dataset, encoder, leases, stop=stop, progress=lambda n: None)


def test_an_encoder_that_made_no_states_leaves_the_folder_to_another(tmp_path):
    dataset = make_tokens(tmp_path / "tokens", BLOCKS)
    about = EmbedsAbout(path=Path("first"), encoder="first", precision="fp32", length=256, width=2)
    claim_folder(dataset.folder, about)
    with pytest.raises(DataError, match="holds the states of the text encoder first"):
        claim_folder(dataset.folder, about.model_copy(update={"encoder": "second"}), in_work=True)
    assert embed(dataset, LetterEncoder("second"))[0]
    with pytest.raises(DataError, match="holds the states of the text encoder second"):
        claim_folder(dataset.folder, about)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "embeds").glob("embeds-*"))}


def loaders(
    datasets: Sequence[TokenDataset], world: int = 1, stored: bool = True, **settings: Any
) -> list[TokenLoader]:
    config = TokenLoaderConfig(window=3, prefetch=0, **settings)
    source: dict[str, Any] = {"text_embeds": [EmbedStore(data) for data in datasets]} if stored else {}
    return [
        TokenLoader(
            config,
            manifests=datasets,
            text_tokenizer=None,
            comm_rank=rank,
            comm_world=world,
            batch_size=12,
            seed=3,
            **(source or {"text_encoder": ENCODER}),
        )
        for rank in range(world)
    ]


def same(ours: TokenLoader, theirs: TokenLoader, steps: int = 6) -> None:
    for _ in range(steps):
        a, b = ours.next_batch(), theirs.next_batch()
        assert torch.equal(a.extra[TEXT_EMBEDS], b.extra[TEXT_EMBEDS])
        assert torch.equal(a.extra[TEXT_EMBEDS_MASK], b.extra[TEXT_EMBEDS_MASK])


@pytest.mark.parametrize("captions", [0, 1, 3])
def test_batches_have_the_states_that_the_encoder_would_give(tmp_path, captions):
    dataset = make_tokens(tmp_path / "tokens", BLOCKS, captions=captions)
    assert embed(dataset) == (2, {})
    (stored,), (online,) = loaders([dataset]), loaders([dataset], stored=False)
    assert stored.order_settings() == online.order_settings(), "a run may go on with the one instead of the other"
    same(stored, online)


def test_every_rank_of_a_mixture_with_partitions_or_not_reads_its_own(tmp_path):
    first = make_tokens(tmp_path / "a", BLOCKS)
    second = make_tokens(tmp_path / "b", [3, 2], shards=1, first=700)
    for dataset in (first, second):
        embed(dataset)
    sources = tuple(SourceConfig(path=data.folder, weight=weight) for data, weight in ((first, 2), (second, 1)))
    for datasets, settings in (([first, second], {"sources": sources}), ([first], {"partitions": 3})):
        stored, online = loaders(datasets, 3, **settings), loaders(datasets, 3, stored=False, **settings)
        for ours, theirs in zip(stored, online, strict=True):
            same(ours, theirs, 4)


def test_a_finished_shard_is_left_alone_and_a_lost_one_is_made_again_alike(tmp_path):
    dataset = make_tokens(tmp_path / "tokens", BLOCKS)
    embed(dataset)
    before = contents(dataset.folder)
    assert embed(dataset) == (0, {})
    (dataset.folder / "embeds/embeds-000001.json").unlink()
    assert embed(dataset) == (1, {}) and contents(dataset.folder) == before


def test_a_stop_or_a_crash_leaves_whole_shards_only(tmp_path):
    dataset = make_tokens(tmp_path / "tokens", BLOCKS)
    asked = iter([False] * 4 + [True])
    with pytest.raises(StopRequested):
        embed(dataset, stop=lambda: next(asked))
    assert sorted(contents(dataset.folder)) == ["embeds-000000.json", "embeds-000000.tar"]
    assert not Leases(dataset.folder / "embeds", 60).active()
    with pytest.raises(DataError, match=r"states of tokens-000001\.tar are missing.*action=embed"):
        EmbedStore(dataset)
    whole = make_tokens(tmp_path / "whole", BLOCKS)
    embed(whole)
    assert embed(dataset) == (1, {}) and contents(dataset.folder) == contents(whole.folder)


def test_what_another_worker_has_is_left_to_it(tmp_path):
    dataset = make_tokens(tmp_path / "tokens", BLOCKS)
    with Leases(dataset.folder / "embeds", 60) as other:
        assert other.claim(1) == "new"
        made, elsewhere = embed(dataset)
    assert made == 1 and elsewhere == {"tokens-000001.tar": other.worker.name}


def test_states_of_another_encoder_or_of_other_captions_are_refused(tmp_path):
    dataset = make_tokens(tmp_path / "tokens", BLOCKS)
    embed(dataset)
    with pytest.raises(DataError, match=r"states of the text encoder letters .*this one is other"):
        embed(dataset, LetterEncoder("other"))
    other = make_tokens(tmp_path / "other", BLOCKS, first=100)
    (dataset.folder / "embeds").rename(other.folder / "embeds")
    with pytest.raises(DataError, match="missing or of other captions"):
        EmbedStore(other)
    with pytest.raises(DataError, match="has no embeds/; run `tokscale tokenize action=embed tokens="):
        EmbedStore(dataset)


def test_a_flipped_bit_and_a_cut_are_found_by_the_reader_and_by_verify(tmp_path):
    dataset = make_tokens(tmp_path / "tokens", BLOCKS)
    embed(dataset)
    assert not list(embed_problems(dataset.folder))
    path = dataset.folder / "embeds/embeds-000000.tar"
    whole = path.read_bytes()
    at = whole.index(np.float32(ord("0")).tobytes())  # the first letter of the first caption
    path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    with pytest.raises(DataError, match=r"embeds-000000\.tar: caption 0 .*fails its checksum"):
        EmbedStore(dataset).read(0, 0)
    assert "sha256 differs" in next(iter(embed_problems(dataset.folder)))[1]
    path.write_bytes(whole[:-512])
    assert "bytes, its record says" in next(iter(embed_problems(dataset.folder)))[1]
    with pytest.raises(DataError, match="missing or of other captions"):
        EmbedStore(dataset)
    store = None
    path.write_bytes(whole)
    store = EmbedStore(dataset)
    os.truncate(path, 1024)
    with pytest.raises(DataError, match=r"no block of states at byte|fails its checksum"):
        store.read(1, 0)
    path.with_suffix(".json").write_text("{")
    assert "no readable record" in next(iter(embed_problems(dataset.folder)))[1]


def test_few_files_are_open_at_a_time_and_a_missing_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_OPEN_FILES", 2)
    dataset = make_tokens(tmp_path / "tokens", [2] * 5, shards=5)
    embed(dataset)
    store = EmbedStore(dataset)
    for block in (0, 1, 2, 3, 4, 0):
        states = store.read(block, 1)
        assert torch.equal(states, ENCODER.encode([dataset.read(block).captions(0)[1]])[0][0])
        assert isinstance(store._files, files.LocalFiles) and len(store._files._open) <= 2
    (dataset.folder / "embeds/embeds-000002.tar").unlink()
    with pytest.raises(DataError, match=r"embeds-000002\.tar: no such file"):
        store.read(2, 0)


def test_the_bill_is_what_will_be_stored(tmp_path):
    dataset = make_tokens(tmp_path / "tokens", BLOCKS)
    price = bill(dataset, ENCODER, 4)
    embed(dataset)
    records = [json.loads(path.read_text()) for path in (dataset.folder / "embeds").glob("embeds-*.json")]
    empty = len(BLOCKS)  # one state for the empty caption of each block
    assert price.captions == 40 and price.bytes == (sum(record["words"] for record in records) - empty) * 2 * 4
    assert "times the" in str(price)
