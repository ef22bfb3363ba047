"""What lies at some positions of an endless stream over one or several data sets, as it is stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokscale.base.errors import ConfigError
from tokscale.base.rng import seed_of
from tokscale.base.shapes import Int, Tensor
from tokscale.data.loading.collate import Picker
from tokscale.data.loading.held_out import Split
from tokscale.data.loading.mixture import Mixture, Source
from tokscale.data.loading.order import BlockOrder
from tokscale.data.loading.token_config import SourceConfig, TokenLoaderConfig
from tokscale.data.loading.windows import SourceReader
from tokscale.data.tokens.blocks import Block
from tokscale.data.tokens.embeds import EmbedStore
from tokscale.data.tokens.manifest import TokenDataset
from tokscale.data.tokens.views import RowMask, View

_NO_IDS = np.zeros(0, np.int64)


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


class StoredSamples:
    """Reads the data sets of a loader, each along its own order."""

    def __init__(
        self,
        config: TokenLoaderConfig,
        datasets: Sequence[TokenDataset],
        *,
        sources: Sequence[SourceConfig],
        text_ids: bool,
        text_embeds: Sequence[EmbedStore],
        batch_size: int,
        seed: int,
        held_out: bool = False,
        alone: bool = True,
    ):
        """Describe what is read; nothing is read yet, but keys where a share of them is held out.

        Args:
            config: How to read.
            datasets: Of images of one shape.
            sources: What each of them is a source's, whose weight and view it has.
            text_ids: Read the caption ids that all of them store.
            text_embeds: Stored states of the captions, one store per source; or none.
            batch_size: Samples of a global batch, which partitions divide.
            seed: Of the order and of the choices per sample.
            held_out: Read the samples that `config.held_out.share` holds out, and not the others.
            alone: There are no images of other shapes.

        Raises:
            ConfigError: When partitions do not fit, or a data set is named twice.
            DataError: When a view is missing, or the data sets hold codes of different tokenizers.
        """
        if config.partitions > 1 and len(datasets) > 1:
            raise ConfigError(
                f"data.partitions={config.partitions} with {len(datasets)} data sets: partitions need a single one; "
                "leave it out"
            )
        assert not text_embeds or len(text_embeds) == len(datasets)
        self._config, self._batch_size, self._seed = config, batch_size, seed
        self._pick, self._text_ids, self._text_embeds = Picker(seed, config.caption_weights), text_ids, text_embeds
        self._labelled = all(dataset.manifest.labels is not None for dataset in datasets)
        self._streams = (config.codes, *config.streams)
        _require_equal_streams(datasets, self._streams)
        named = list(zip(datasets, sources, strict=True))
        views = [_rows(dataset, source, config.held_out.share, held_out, alone) for dataset, source in named]
        self._readers = [self._reader(dataset, view) for dataset, view in zip(datasets, views, strict=True)]
        self.sources = tuple(
            Source(dataset.manifest.id + (f"/{view.id}" if view else ""), source.weight)
            for (dataset, source), view in zip(named, views, strict=True)
        )
        """What is mixed: the data sets by their content, and their weights."""

    @property
    def counts(self) -> list[int]:
        """Samples of one pass over each data set, as its view keeps them."""
        return [reader.order.samples for reader in self._readers]

    def read(self, mixture: Mixture, start: int, stop: int, *, place: int | None = None) -> StoredBatch:
        """The samples at positions `[start, stop)` of a mixture of the sources.

        Args:
            mixture: Of the sources.
            start: The first one's position.
            stop: Beyond the last one's.
            place: The first one's position in the whole stream, where this mixture is a part of it.
        """
        count, place = stop - start, start if place is None else place
        positions = torch.arange(place, place + count)
        codes: dict[str, NDArray[Any]] = {}
        captions, keys, ids = [""] * count, [""] * count, [_NO_IDS] * count
        labels = np.zeros(count, np.int64) if self._labelled else None
        states: list[Tensor] = [torch.empty(0)] * count
        for part in mixture.parts(start, stop):
            assert part.segment == len(mixture.segments) - 1, "only the newest segment's data sets are open"
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
                if self._text_ids:
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
            ids if self._text_ids else None,
            labels,
            states if self._text_embeds else None,
        )

    def _reader(self, dataset: TokenDataset, view: RowMask | None) -> SourceReader:
        config = self._config
        order = BlockOrder(
            view.sizes if view else dataset.sizes,
            seed=seed_of(self._seed, "order", dataset.manifest.id),
            window=config.window,
            shuffle=config.shuffle,
            partitions=config.partitions,
            batch_size=self._batch_size,
        )
        text = ("text", "text_off") if self._text_ids else ()
        label = ("label",) if self._labelled else ()
        return SourceReader(
            dataset,
            order,
            view=view,
            tensors=(*self._streams, "cap", "cap_off", "cap_row", "key", "key_off", *text, *label),
            substitutes=config.max_bad_blocks if config.on_bad_block == "substitute" else 0,
        )

    def _pick_codes(
        self, reader: SourceReader, block: Block, rows: NDArray[np.int64], positions: Int[Tensor, "count"]
    ) -> dict[str, NDArray[Any]]:
        variants = reader.dataset.manifest.variants
        if variants == 1:
            return {name: block.tensors[name][rows] for name in self._streams}
        chosen = self._pick.variants(positions, variants)
        return {name: block.tensors[name][rows, chosen] for name in self._streams}


def _rows(dataset: TokenDataset, source: SourceConfig, share: float, held_out: bool, alone: bool) -> RowMask | None:
    """Which rows of a data set are read; None for all."""
    view = View(dataset, source.view) if source.view else None
    if not share:
        return view
    split = Split(dataset, share, some=alone)
    return (split.held_out if held_out else split.trained).within(view)


def _require_equal_streams(datasets: Sequence[TokenDataset], streams: Sequence[str]) -> None:
    for name in streams:
        first = datasets[0].stream(name)
        for dataset in datasets[1:]:
            dataset.require({name: first})


def _scatter(into: list[Any], places: Sequence[int], values: Sequence[Any]) -> None:
    for place, value in zip(places, values, strict=True):
        into[place] = value
