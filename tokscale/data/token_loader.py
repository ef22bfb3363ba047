"""Token shards to batches, resumable at any position by any number of ranks.

What is random per sample (which caption, which crop) is a hash of the position. So the state is one position and a
description of the stream, equal on all ranks, and reading goes on from it wherever and on however many ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from tokscale.base.batch import CODE_CHANCES, LABELS, TEXT_EMBEDS, TEXT_EMBEDS_MASK, TokenBatch
from tokscale.base.config import Config, encode
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.log import logger
from tokscale.base.protocols import TextEncoder, TextTokenizer
from tokscale.base.rng import seed_of
from tokscale.base.shapes import Int, Tensor
from tokscale.data.blocks import Block
from tokscale.data.collate import Picker, encode_captions, pad_ids, pad_states
from tokscale.data.embeds import EmbedStore
from tokscale.data.manifest import CODES, TokenDataset
from tokscale.data.mixture import Mixture, Segment, Source
from tokscale.data.order import DEFAULT_WINDOW, ORDER_VERSION, BlockOrder
from tokscale.data.stream import PositionLoader
from tokscale.data.views import View
from tokscale.data.windows import SourceReader
from tokscale.tokenizers.quantize.soft import SoftCodes, SoftCodesConfig

log = logger("data")
_NO_IDS = np.zeros(0, np.int64)


class SourceConfig(Config):
    """One data set of a mixture."""

    path: Path
    """Folder of token shards."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the samples, relative to the other sources."""
    view: str | None = None
    """Name of a view to read instead of all samples."""


class TokenLoaderConfig(Config):
    """How token shards are read."""

    sources: tuple[SourceConfig, ...] = ()
    """Data sets and their weights; none means all of `data_dir/tokens`."""
    shuffle: bool = True
    """False reads in the stored order, for evaluation."""
    window: int = Field(default=DEFAULT_WINDOW, ge=1)
    """Blocks that are shuffled together, 256 samples each by default. Part of the order."""
    lanes: int = Field(default=1, ge=1)
    """Independent block lists, for payloads too heavy for every rank to read every block. Divides the global batch."""
    prefetch: int = Field(default=4, ge=0)
    """Batches that a thread prepares ahead; 0 reads in the training thread."""
    codes: str = CODES
    """Stream of the model's own codes. `codes.low` trains a base model on what a super-resolution model is told, from
    the same token shards; `image_tokenizer` is then that of the low resolution."""
    streams: tuple[str, ...] = ()
    """Further code streams to give as `TokenBatch.extra`, e.g. `codes.low`."""
    caption_weights: tuple[float, ...] = ()
    """Relative chance of a picture's first, second, ... caption; captions beyond the list count as 1."""
    text_embeds: Literal["online", "stored"] = "online"
    """Where a text encoder's states come from, for models that are told them: the encoder reads each batch's captions,
    or they were stored by `tokenize action=embed`."""
    soft_codes: SoftCodesConfig | None = None
    """Codes drawn anew in every epoch, and their distributions as targets, for RQ-Transformer on residual codes."""
    on_bad_block: Literal["error", "substitute"] = "error"
    """Whether a damaged block stops the run, or other samples take its place."""
    max_bad_blocks: int = Field(default=16, ge=0)
    """Damaged blocks of a data set that may be substituted before it is an error after all."""
    on_change: Literal["error", "segment"] = "error"
    """When a run resumes with other data sets or weights: refuse, or go on with them from there, on the record."""


@dataclass(frozen=True)
class StoredBatch:
    """Samples as they are stored: codes in their small dtype, captions chosen but not yet ids."""

    positions: Int[Tensor, "batch"]
    codes: Mapping[str, NDArray[Any]]
    """By stream."""
    captions: Sequence[str]
    keys: Sequence[str]
    ids: Sequence[NDArray[Any]] | None
    """Stored ids of the captions, when they are the text tokenizer's."""
    labels: NDArray[np.int64] | None = None
    """Classes, when all data sets have them."""
    states: Sequence[Tensor] | None = None
    """A text encoder's states of the captions, where they are stored."""


@dataclass(frozen=True)
class _Prepared:
    stored: StoredBatch
    text: Tensor
    mask: Tensor
    codes: Mapping[str, Tensor]
    labels: Tensor | None
    words: tuple[Tensor, Tensor] | None
    """For the text encoder: its ids, or the states that were stored; and their mask."""


def open_sources(config: TokenLoaderConfig, default: Path) -> list[TokenDataset]:
    """Open the data sets of a configuration; `default` when it names none."""
    return [TokenDataset(source.path) for source in config.sources] or [TokenDataset(default)]


class TokenLoader(PositionLoader[_Prepared, TokenBatch]):
    """One rank's share of an endless stream of pictures as codes: `base.protocols.Loader`."""

    def __init__(
        self,
        config: TokenLoaderConfig,
        *,
        manifests: Sequence[TokenDataset],
        text_tokenizer: TextTokenizer | None,
        text_encoder: TextEncoder | None = None,
        text_embeds: Sequence[EmbedStore] = (),
        soft_codes: SoftCodes | None = None,
        comm_rank: int = 0,
        comm_world: int = 1,
        batch_size: int,
        seed: int,
        text_length: int = 256,
        device: torch.device | None = None,
    ):
        """Describe the stream; nothing is read before the first batch.

        Args:
            config: How to read.
            manifests: The open data sets, see `open_sources`; one per source.
            text_tokenizer: Turns captions into ids; None gives texts of no tokens.
            text_encoder: Gives the states of the same captions as `extra[TEXT_EMBEDS]`, as wide as the longest of the
                batch needs; its ids are made ahead, its states when the batch is delivered.
            text_embeds: Instead of `text_encoder`: stored states, one store per source.
            soft_codes: Of the tokenizer whose codes are read; gives `extra[CODE_CHANCES]`.
            comm_rank: This rank among those that share the batch.
            comm_world: How many they are.
            batch_size: Samples of a global batch.
            seed: Of the order and of the choices per sample.
            text_length: Width of the caption ids.
            device: Where batches go: codes travel pinned in their small dtype and are widened there.

        Raises:
            ConfigError: When the ranks do not divide the batch, or lanes do not fit.
            DataError: When a view is missing, or the data sets hold codes of different tokenizers.
        """
        super().__init__(batch_size=batch_size, rank=comm_rank, world=comm_world, prefetch=config.prefetch)
        if config.lanes > 1 and len(manifests) > 1:
            raise ConfigError(f"lanes={config.lanes} with {len(manifests)} data sets: lanes need a single one")
        self.config, self._seed, self._pick = config, seed, Picker(seed, config.caption_weights)
        self._text_tokenizer, self._text_length = text_tokenizer, text_length
        self._text_encoder, self._text_embeds = text_encoder, tuple(text_embeds)
        self._soft_codes = soft_codes
        assert not (text_encoder and text_embeds), "states are made or stored, not both"
        assert not text_embeds or len(text_embeds) == len(manifests)
        self._labelled = all(dataset.manifest.labels is not None for dataset in manifests)
        self._device = device or torch.device("cpu")
        self._streams = (config.codes, *config.streams)
        _require_equal_streams(manifests, self._streams)
        sources = config.sources or (SourceConfig(path=manifests[0].folder),)
        pairs = [
            (dataset, View(dataset, source.view) if source.view else None, source.weight)
            for dataset, source in zip(manifests, sources, strict=True)
        ]
        self._use_stored_text = text_tokenizer is not None and all(
            dataset.stored_text(text_tokenizer, text_length) for dataset in manifests
        )
        self._readers = [self._reader(dataset, view) for dataset, view, _ in pairs]
        self._wanted = tuple(
            Source(dataset.manifest.id + (f"/{view.id}" if view else ""), weight) for dataset, view, weight in pairs
        )
        if len({source.identity for source in self._wanted}) < len(self._wanted):
            raise ConfigError("a data set is named twice in sources; name it once, with the sum of the weights")
        self._mixture = Mixture([Segment(0, self._wanted)], seed)

    @property
    def samples(self) -> int:
        """Samples of one pass over all data sets, as their views keep them."""
        return sum(reader.order.samples for reader in self._readers)

    def order_settings(self) -> dict[str, Any]:
        """See `PositionLoader`; the data sets themselves are in the segments."""
        settings = {
            "order_version": ORDER_VERSION,
            "seed": self._seed,
            "shuffle": self.config.shuffle,
            "window": self.config.window,
            "lanes": self.config.lanes,
        }
        for source in (self._text_encoder, *self._text_embeds):
            if source is not None:
                settings["text_encoder"] = source.fingerprint
        if self._soft_codes is not None:
            settings["soft_codes"] = encode(self._soft_codes.config)
        return settings | ({"batch_size": self.batch_size} if self.config.lanes > 1 else {})

    def state_dict(self) -> dict[str, Any]:
        """Position, order and the history of data sets and weights; JSON-ready, equal on all ranks."""
        return super().state_dict() | {"segments": [segment.encoded() for segment in self._mixture.segments]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a position, at any number of ranks; the batch size may differ, too, unless there are lanes.

        Raises:
            DataError: When the stream is not the one that was being read, and `on_change` does not allow it.
        """
        super().load_state_dict(state)
        self._mixture = Mixture([Segment.decoded(segment) for segment in state["segments"]], self._seed)
        before, now = (
            {source.identity: source.weight for source in sources}
            for sources in (self._mixture.segments[-1].sources, self._wanted)
        )
        if list(before.items()) == list(now.items()):
            return
        words = f"data sets and weights {_shown(before)} in the checkpoint, {_shown(now)} in this run"
        if self.config.on_change == "error":
            raise DataError(f"{words}; set them as they were, or on_change=segment to go on with the new ones")
        log.warning("from position %d on, the data change: %s", self._position, words)
        self._mixture = Mixture(self._mixture.continued(self._position, self._wanted), self._seed)

    def read(self, start: int, stop: int) -> StoredBatch:
        """The samples at positions `[start, stop)` of the stream, as they are stored."""
        count, positions = stop - start, torch.arange(start, stop)
        codes: dict[str, NDArray[Any]] = {}
        captions, keys, ids = [""] * count, [""] * count, [_NO_IDS] * count
        labels = np.zeros(count, np.int64) if self._labelled else None
        states: list[Tensor] = [torch.empty(0)] * count
        for part in self._mixture.parts(start, stop):
            assert part.segment == len(self._mixture.segments) - 1, "only the newest segment's data sets are open"
            reader, done = self._readers[part.source], 0
            for block, rows, origin in reader.read(part.start, part.stop):
                where = part.where[done : done + len(rows)]
                done += len(rows)
                for name, picked in self._pick_codes(reader, block, rows, positions[where]).items():
                    codes.setdefault(name, np.empty((count, *picked.shape[1:]), picked.dtype))[where.numpy()] = picked
                numbers = self._pick.captions(block, rows, positions[where])
                places = where.tolist()
                _scatter(captions, places, block.caption_texts(numbers))
                _scatter(keys, places, block.keys(rows))
                if labels is not None:
                    labels[where.numpy()] = block.tensors["label"][rows]
                if self._use_stored_text:
                    _scatter(ids, places, block.caption_ids(numbers))
                if self._text_embeds:
                    store, (owners, own) = self._text_embeds[part.source], origin.captions(rows, numbers)
                    pairs = zip(owners.tolist(), own.tolist(), strict=True)
                    _scatter(states, places, [store.read(owner, number) for owner, number in pairs])
        return StoredBatch(
            positions,
            codes,
            captions,
            keys,
            ids if self._use_stored_text else None,
            labels,
            states if self._text_embeds else None,
        )

    def prepare(self, start: int, stop: int) -> _Prepared:
        """Read, and turn captions into ids; in the prefetching thread."""
        stored = self.read(start, stop)
        if stored.ids is not None:
            text, mask = pad_ids(stored.ids, self._text_length)
        else:
            text, mask = encode_captions(stored.captions, self._text_tokenizer, self._text_length)
        codes = {name: torch.from_numpy(array) for name, array in stored.codes.items()}
        labels = torch.from_numpy(stored.labels) if stored.labels is not None else None
        words = pad_states(stored.states) if stored.states is not None else None
        if self._text_encoder is not None:
            words = self._text_encoder.tokenize(stored.captions)
        if self._device.type == "cuda":
            words = (words[0].pin_memory(), words[1].pin_memory()) if words is not None else None
            codes = {name: tensor.pin_memory() for name, tensor in codes.items()}
            text, mask = text.pin_memory(), mask.pin_memory()
        return _Prepared(stored, text, mask, codes, labels, words)

    def deliver(self, prepared: _Prepared) -> TokenBatch:
        """Bring to the device, widen and soften the codes there, and let the text encoder read the captions."""
        move = lambda tensor: tensor.to(self._device, non_blocking=True)  # noqa: E731
        codes = {name: move(tensor).to(torch.int64) for name, tensor in prepared.codes.items()}
        main, positions = codes.pop(self.config.codes), move(prepared.stored.positions)
        extra = codes
        if self._soft_codes is not None:
            main, extra[CODE_CHANCES] = self._soft_codes(main, positions)
        if prepared.labels is not None:
            extra[LABELS] = move(prepared.labels)
        if prepared.words is not None:
            ids_or_states, seen = prepared.words
            states = self._text_encoder.states(ids_or_states, seen) if self._text_encoder else ids_or_states
            extra[TEXT_EMBEDS], extra[TEXT_EMBEDS_MASK] = move(states), move(seen)
        return TokenBatch(
            positions=positions,
            text=move(prepared.text),
            text_mask=move(prepared.mask),
            codes=main,
            keys=prepared.stored.keys,
            extra=extra,
        )

    def _reader(self, dataset: TokenDataset, view: View | None) -> SourceReader:
        order = BlockOrder(
            view.sizes if view else dataset.sizes,
            seed=seed_of(self._seed, "order", dataset.manifest.id),
            window=self.config.window,
            shuffle=self.config.shuffle,
            lanes=self.config.lanes,
            batch_size=self.batch_size,
        )
        text = ("text", "text_off") if self._use_stored_text else ()
        label = ("label",) if self._labelled else ()
        return SourceReader(
            dataset,
            order,
            view=view,
            tensors=(*self._streams, "cap", "cap_off", "cap_row", "key", "key_off", *text, *label),
            substitutes=self.config.max_bad_blocks if self.config.on_bad_block == "substitute" else 0,
        )

    def _pick_codes(
        self, reader: SourceReader, block: Block, rows: NDArray[np.int64], positions: Int[Tensor, "count"]
    ) -> dict[str, NDArray[Any]]:
        variants = reader.dataset.manifest.variants
        if variants == 1:
            return {name: block.tensors[name][rows] for name in self._streams}
        chosen = self._pick.variants(positions, variants)
        return {name: block.tensors[name][rows, chosen] for name in self._streams}


def _require_equal_streams(datasets: Sequence[TokenDataset], streams: Sequence[str]) -> None:
    for name in streams:
        first = datasets[0].stream(name)
        for dataset in datasets[1:]:
            dataset.require({name: first})


def _scatter(into: list[Any], places: Sequence[int], values: Sequence[Any]) -> None:
    for place, value in zip(places, values, strict=True):
        into[place] = value


def _shown(weights: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{identity[:12]}: {weight:g}" for identity, weight in weights.items()) + "}"
