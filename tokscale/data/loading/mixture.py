"""Several data sets in one stream, in exact proportions, with changes on the record.

A table of 10,000 hash-shuffled slots holds each source in proportion to its weight. Position p belongs to the source
of slot `p mod 10,000`; that source's own position is how often it came before. So a mixture costs nothing to resume and
to seek. When weights or data sets change in the middle of a run, a new `Segment` begins at that position.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from tokscale.base.errors import ConfigError
from tokscale.base.rng import mix64, seed_of
from tokscale.base.shapes import Int, Tensor

SLOTS = 10_000


@dataclass(frozen=True)
class Source:
    """One data set within a segment of the stream."""

    identity: str
    """What is read: the manifest's id, and the view's where one is used."""
    weight: float
    base: int = 0
    """The source's own position where the segment begins."""


@dataclass(frozen=True)
class Segment:
    """From position `start` on, these sources."""

    start: int
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        if not self.sources or min(source.weight for source in self.sources) <= 0:
            weights = [source.weight for source in self.sources]
            raise ConfigError(f"a mixture needs sources with weights above 0, got {weights}; leave out what has none")

    def encoded(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def decoded(cls, values: Mapping[str, Any]) -> "Segment":
        """What `encoded` gave."""
        return cls(values["start"], tuple(Source(**source) for source in values["sources"]))


class MixtureTable:
    """Which source each position belongs to, by weights alone."""

    def __init__(self, weights: Sequence[float], seed: int):
        """Share `SLOTS` slots among sources, largest remainders first, at least one slot each.

        Raises:
            ConfigError: When a weight is too small a share to get a slot.
        """
        total = sum(weights)
        exact = [weight / total * SLOTS for weight in weights]
        self.counts = [int(share) for share in exact]
        by_remainder = sorted(range(len(weights)), key=lambda i: self.counts[i] - exact[i])
        for index in by_remainder[: SLOTS - sum(self.counts)]:
            self.counts[index] += 1
        if min(self.counts) == 0:
            raise ConfigError(
                f"weights {list(weights)}: the smallest is below 1/{SLOTS} of the whole and would never be read; "
                "raise it or leave the source out"
            )
        slots = torch.arange(len(weights)).repeat_interleave(torch.tensor(self.counts))
        shuffled = mix64(torch.arange(SLOTS) ^ seed_of(seed, "mixture")).argsort()
        self.slots = slots[shuffled]
        chosen = torch.nn.functional.one_hot(self.slots, len(weights)).cumsum(0)
        self._before = torch.cat([torch.zeros(1, len(weights), dtype=torch.int64), chosen])

    def sources(self, start: int, stop: int) -> Int[Tensor, "count"]:
        """The source of each position in `[start, stop)`, counted from the segment's beginning."""
        return self.slots[torch.arange(start, stop) % SLOTS]

    def before(self, index: int, position: int) -> int:
        """How many positions before `position` belong to source `index`."""
        turns, slot = divmod(position, SLOTS)
        return turns * self.counts[index] + int(self._before[slot, index])


@dataclass(frozen=True)
class Part:
    """What one source gives to a range of positions."""

    segment: int
    source: int
    start: int
    stop: int
    """The source's own positions, `[start, stop)`."""
    where: Int[Tensor, "count"]
    """Their places in the range, ascending."""


class Mixture:
    """The stream as a list of segments, oldest first."""

    def __init__(self, segments: Sequence[Segment], seed: int):
        """Take the segments of a run; the last one is endless."""
        assert segments and segments[0].start == 0 and all(a.start < b.start for a, b in pairwise(segments))
        self.segments = tuple(segments)
        self._tables = [MixtureTable([source.weight for source in segment.sources], seed) for segment in segments]

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """Split positions `[start, stop)` by segment and source."""
        ends = [segment.start for segment in self.segments[1:]] + [stop]
        for number, (segment, end) in enumerate(zip(self.segments, ends, strict=True)):
            low, high = max(start, segment.start), min(stop, end)
            if low >= high:
                continue
            table = self._tables[number]
            owners = table.sources(low - segment.start, high - segment.start)
            for index, source in enumerate(segment.sources):
                first = source.base + table.before(index, low - segment.start)
                where = (owners == index).nonzero().flatten() + (low - start)
                if len(where):
                    yield Part(number, index, first, first + len(where), where)

    def continued(self, start: int, sources: Sequence[Source]) -> tuple[Segment, ...]:
        """These segments and a new one that begins at `start` with other weights or data sets.

        A data set that was read before goes on where it stood; a new or a changed one begins at its first position.
        """
        kept = [segment for segment in self.segments if segment.start < start]
        ends = [segment.start for segment in kept[1:]] + [start]
        stood: dict[str, int] = {}
        for segment, table, end in zip(kept, self._tables, ends, strict=False):
            for index, source in enumerate(segment.sources):
                stood[source.identity] = source.base + table.before(index, end - segment.start)
        fresh = [Source(source.identity, source.weight, stood.get(source.identity, 0)) for source in sources]
        return (*kept, Segment(start, tuple(fresh)))
