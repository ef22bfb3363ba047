"""Token shards to batches, resumable at any position by any number of ranks.

What is random per sample (which caption, which crop) is a hash of the position. So the state is one position and a
description of the stream, equal on all ranks, and reading goes on from it wherever and on however many ranks.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Self

import torch

from tokscale.base.batch import LABELS, SOFT_TARGETS, TEXT_EMBEDS, TEXT_EMBEDS_MASK, TokenBatch
from tokscale.base.config import encode
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.log import logger
from tokscale.base.protocols import TextEncoder, TextTokenizer
from tokscale.base.shapes import Tensor
from tokscale.data.loading.collate import encode_captions, pad_ids, pad_states
from tokscale.data.loading.held_out import Split
from tokscale.data.loading.mixture import Mixture, Segment, Source
from tokscale.data.loading.order import ORDER_VERSION
from tokscale.data.loading.shapes import ShapeOrder
from tokscale.data.loading.stored_samples import StoredBatch, StoredSamples
from tokscale.data.loading.stream import PositionLoader
from tokscale.data.loading.token_config import SourceConfig, TokenLoaderConfig, source_of
from tokscale.data.tokens.embeds import EmbedStore
from tokscale.data.tokens.manifest import TokenDataset
from tokscale.tokenizers.quantize.soft import SoftCodes

log = logger("data")


@dataclass(frozen=True)
class _Prepared:
    stored: StoredBatch
    text: Tensor
    mask: Tensor
    codes: Mapping[str, Tensor]
    labels: Tensor | None
    words: tuple[Tensor, Tensor] | None
    """For the text encoder: its ids, or the states that were stored; and their mask."""


class TokenLoader(PositionLoader[_Prepared, TokenBatch]):
    """One rank's share of an endless stream of images as codes: `base.protocols.Loader`."""

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
        held_out: bool = False,
    ):
        """Describe the stream; nothing is read before the first batch.

        Args:
            config: How to read.
            manifests: The open data sets, see `open_sources`. Where they hold images of several shapes, each batch is
                of one, see `data.loading.shapes`, and the batch size is a part of the order.
            text_tokenizer: Turns captions into ids; None gives texts of no tokens.
            text_encoder: Gives the states of the same captions as `extra[TEXT_EMBEDS]`, as wide as the longest of the
                batch needs; its ids are made ahead, its states when the batch is delivered.
            text_embeds: Instead of `text_encoder`: stored states, one store per data set.
            soft_codes: Of the tokenizer whose codes are read; gives `extra[SOFT_TARGETS]`.
            comm_rank: This rank among those that share the batch.
            comm_world: How many they are.
            batch_size: Samples of a global batch.
            seed: Of the order and of the choices per sample.
            text_length: Width of the caption ids.
            device: Where batches go: codes travel pinned in their small dtype and are widened there.
            held_out: Read the samples that `config.held_out.share` keeps from training.

        Raises:
            ConfigError: When the ranks do not divide the batch, partitions do not fit, a data set is named twice, or
                there are several shapes and a key asks for what a stream of several cannot do.
            DataError: When a view is missing, or the data sets hold codes of different tokenizers.
        """
        super().__init__(batch_size=batch_size, rank=comm_rank, world=comm_world, prefetch=config.prefetch)
        assert not (text_encoder and text_embeds), "states are made or stored, not both"
        self.config, self._seed = config, seed
        self._text_tokenizer, self._text_length = text_tokenizer, text_length
        self._text_encoder, self._text_embeds = text_encoder, tuple(text_embeds)
        self._soft_codes, self._device = soft_codes, device or torch.device("cpu")
        owners = source_of(config, manifests)
        groups = by_shape(manifests, (config.codes, *config.streams))
        several = len(groups) > 1
        if held_out and several:
            groups = _with_some_held_out(groups, manifests, config.held_out.share)
        if several and config.on_change == "segment":
            raise ConfigError("data.on_change=segment: a run of several shapes of images keeps its data; leave it out")
        self._shapes = self._stored(manifests, groups, owners, held_out=held_out, alone=not several)
        self._sources = _weighted(self._shapes, [[owners[at] for at in group] for group in groups])
        if len({source.identity for shape in self._sources for source in shape}) < sum(map(len, groups)):
            raise ConfigError("a data set is named twice in sources; name it once, with the sum of the weights")
        self._mixtures = [Mixture([Segment(0, shape)], seed) for shape in self._sources]
        self._order = self._shape_order(one_source=len(set(owners)) == 1) if several else None

    def _stored(
        self,
        manifests: Sequence[TokenDataset],
        groups: Sequence[Sequence[int]],
        owners: Sequence[int],
        *,
        held_out: bool,
        alone: bool,
    ) -> list[StoredSamples]:
        """What is read of each shape of images; stored caption ids where all data sets have this tokenizer's."""
        config, tokenizer = self.config, self._text_tokenizer
        sources = config.sources or (SourceConfig(path=manifests[0].folder),)
        text_ids = tokenizer is not None and all(
            dataset.stored_text(tokenizer, self._text_length) for dataset in manifests
        )
        return [
            StoredSamples(
                config,
                [manifests[at] for at in group],
                sources=[sources[owners[at]] for at in group],
                text_ids=text_ids,
                text_embeds=[self._text_embeds[at] for at in group] if self._text_embeds else (),
                batch_size=self.batch_size,
                seed=self._seed,
                held_out=held_out,
                alone=alone,
            )
            for group in groups
        ]

    def _shape_order(self, *, one_source: bool) -> ShapeOrder:
        """Which batches are of which shape: by weight, or of one source by whole samples, so that each comes once."""
        weights = [sum((Fraction(source.weight) for source in shape), Fraction()) for shape in self._sources]
        counts = [sum(shape.counts) for shape in self._shapes]
        shares = [weight / sum(weights, Fraction()) * sum(counts) for weight in weights]
        samples = counts if one_source else shares
        return ShapeOrder(samples, batch_size=self.batch_size, seed=self._seed, shuffle=self.config.shuffle)

    @property
    def samples(self) -> int:
        """Samples of one pass over all data sets, as their views keep them."""
        return sum(sum(shape.counts) for shape in self._shapes)

    def by_shape(self) -> list[Self]:
        """A loader for each shape of images alone, from its first sample on; itself where there is one."""
        if self._order is None:
            return [self]
        alone = [copy(self) for _ in self._shapes]
        for number, loader in enumerate(alone):
            loader._order, loader._ahead, loader._position = None, None, 0
            loader._shapes, loader._sources = [self._shapes[number]], [self._sources[number]]
            loader._mixtures = [self._mixtures[number]]
        return alone

    def order_settings(self) -> dict[str, Any]:
        """See `PositionLoader`; the data sets themselves are in the segments."""
        settings = {
            "order_version": ORDER_VERSION,
            "seed": self._seed,
            "shuffle": self.config.shuffle,
            "window": self.config.window,
            "partitions": self.config.partitions,
        }
        for source in (self._text_encoder, *self._text_embeds):
            if source is not None:
                settings["text_encoder"] = source.fingerprint
        if self._soft_codes is not None:
            settings["soft_codes"] = encode(self._soft_codes.config)
        fixed = self.config.partitions > 1 or self._order is not None
        return settings | ({"batch_size": self.batch_size} if fixed else {})

    def state_dict(self) -> dict[str, Any]:
        """Position, order and the history of data sets and weights; JSON-ready, equal on all ranks."""
        segments = [[segment.encoded() for segment in mixture.segments] for mixture in self._mixtures]
        return super().state_dict() | ({"segments": segments[0]} if self._order is None else {"shapes": segments})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a position, at any number of ranks.

        The batch size may differ, too, unless there are partitions or several shapes of images.

        Raises:
            DataError: When the stream is not the one that was being read, and `on_change` does not allow it.
        """
        stored = state.get("shapes") or [state["segments"]]
        mixtures = [Mixture([Segment.decoded(segment) for segment in shape], self._seed) for shape in stored]
        before, now = (
            [[(source.identity, source.weight) for source in shape] for shape in shapes]
            for shapes in ([mixture.segments[-1].sources for mixture in mixtures], self._sources)
        )
        words = f"data sets and weights {_shown(before)} in the checkpoint, {_shown(now)} in this run"
        if before != now and max(len(before), len(now)) > 1:
            raise DataError(f"{words}; set them as they were: a run of several shapes of images keeps its data")
        super().load_state_dict(state)
        self._mixtures = mixtures
        if before == now:
            return
        if self.config.on_change == "error":
            raise DataError(f"{words}; set them as they were, or data.on_change=segment to go on with the new ones")
        log.warning("from position %d on, the data change: %s", self._position, words)
        self._mixtures = [Mixture(mixtures[0].continued(self._position, self._sources[0]), self._seed)]

    def read(self, start: int, stop: int) -> StoredBatch:
        """The samples at positions `[start, stop)` of the stream, as they are stored.

        Where there are several shapes of images, these lie in one global batch.
        """
        if self._order is None:
            return self._shapes[0].read(self._mixtures[0], start, stop)
        number, place = divmod(start, self.batch_size)
        assert place + stop - start <= self.batch_size, "a global batch is of one shape, and two are of two"
        shape, own = self._order.batch(number)
        first = own * self.batch_size + place
        return self._shapes[shape].read(self._mixtures[shape], first, first + stop - start, place=start)

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
            main, extra[SOFT_TARGETS] = self._soft_codes(main, positions)
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


def by_shape(datasets: Sequence[TokenDataset], streams: Sequence[str]) -> list[list[int]]:
    """The numbers of the data sets of each shape of images, shapes in the order in which they come."""
    groups: dict[Any, list[int]] = {}
    for number, dataset in enumerate(datasets):
        groups.setdefault(tuple(dataset.stream(name).code_shape for name in streams), []).append(number)
    return list(groups.values())


def _with_some_held_out(
    groups: Sequence[Sequence[int]], datasets: Sequence[TokenDataset], share: float
) -> list[list[int]]:
    """Those data sets of each shape of which any sample is held out: of a rare shape there may be none.

    Raises:
        DataError: When there is none of any.
    """
    some = [bool(Split(dataset, share, some=False).held_out.sizes.any()) for dataset in datasets]
    if not any(some):
        raise DataError(f"data.held_out.share={share:g} holds no sample out; choose a larger share, or 0 for none")
    kept = [[at for at in group if some[at]] for group in groups]
    return [group for group in kept if group]


def _weighted(shapes: Sequence[StoredSamples], owners: Sequence[Sequence[int]]) -> list[tuple[Source, ...]]:
    """What each shape is a mixture of: data sets of one source share its weight, in proportion to their samples.

    Args:
        shapes: What is read of each.
        owners: The source of each of its data sets.
    """
    samples: dict[int, int] = {}
    for shape, numbers in zip(shapes, owners, strict=True):
        for owner, count in zip(numbers, shape.counts, strict=True):
            samples[owner] = samples.get(owner, 0) + count
    return [
        tuple(
            replace(source, weight=source.weight * (count / samples[owner]))
            for source, count, owner in zip(shape.sources, shape.counts, numbers, strict=True)
        )
        for shape, numbers in zip(shapes, owners, strict=True)
    ]


def _shown(shapes: Sequence[Sequence[tuple[str, float]]]) -> str:
    return "{" + ", ".join(f"{name[:12]}: {weight:g}" for shape in shapes for name, weight in shape) + "}"
