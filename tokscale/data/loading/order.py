"""The canonical order of a data set: position is the state.

Every position of an endless stream has one sample, a pure function of (block sizes, seed, position). Nothing depends on
the number of ranks, so a run that resumes elsewhere sees the very same global batches. Shuffling is by hashed sort
keys (splitmix64), not by a library's permutation: those promise no stability between versions.

Per epoch: (1) all blocks are sorted by hashed block number; (2) every `window` consecutive blocks form a window,
inside which the rows are sorted by hashed row number. Each sample comes exactly once per epoch, blocks may have any
size, and nothing is padded or dropped. Only blocks are sorted as a whole: 10^9 samples in blocks of 256 take a second.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tokscale.base.errors import ConfigError, DataError
from tokscale.base.rng import mix64, seed_of
from tokscale.base.shapes import Int, Tensor

ORDER_VERSION = 1
"""Changes when any position of any data set changes its sample; checkpoints record it."""
DEFAULT_WINDOW = 64
"""Blocks per window: 16,384 samples, about 10 MB of codes and captions."""
_CHUNK = 1 << 20


class WindowKey(NamedTuple):
    """One window of one epoch of one partition."""

    partition: int
    epoch: int
    number: int


@dataclass(frozen=True)
class Run:
    """Consecutive positions inside one window: entries `[first, first + count)` of its shuffled rows."""

    window: WindowKey
    first: int
    count: int


@dataclass(frozen=True)
class _Epoch:
    blocks: Int[Tensor, "blocks"]
    starts: Int[Tensor, "windows_and_one"]


class BlockOrder:
    """The endless order over a data set that is stored in blocks.

    With `partitions > 1` the blocks are dealt to that many independent lists, and each global batch takes an equal,
    contiguous part from each: a rank whose share lies within some partitions reads only their blocks. That is for
    payloads too heavy for every rank to read every block, and makes the batch size a part of the order.
    """

    def __init__(
        self,
        sizes: Int[Tensor, "blocks"],
        *,
        seed: int,
        window: int = DEFAULT_WINDOW,
        shuffle: bool = True,
        partitions: int = 1,
        batch_size: int | None = None,
    ):
        """Describe the order; epochs are sorted when they are first asked for.

        Args:
            sizes: Samples per block; zero is allowed (a block whose rows a view leaves out).
            seed: Base of the order's named streams.
            window: Blocks per window.
            shuffle: False gives the stored order, the same in every epoch.
            partitions: Independent block lists.
            batch_size: Samples of a global batch; needed with partitions.

        Raises:
            DataError: When there is no sample, or a partition would have none.
            ConfigError: When `partitions` does not divide `batch_size`.
        """
        if partitions > 1 and (batch_size is None or batch_size % partitions):
            raise ConfigError(
                f"data.partitions={partitions} does not divide the global batch of {batch_size}; choose a divisor"
            )
        if window < 1:
            raise ConfigError(f"data.window={window}: an order needs windows of at least one block")
        self.seed, self.window, self.shuffle, self.partitions = seed, window, shuffle, partitions
        self.samples = int(sizes.sum())
        self._sizes = sizes.to(torch.int32)
        self._per_batch = batch_size // partitions if batch_size and partitions > 1 else 0
        self._partition_blocks = list(self._split_blocks())
        self._partition_samples = [
            self.samples if blocks is None else int(self._sizes[blocks].sum()) for blocks in self._partition_blocks
        ]
        if min(self._partition_samples) == 0:
            raise DataError(
                f"{len(sizes)} blocks with {self.samples} samples cannot feed {partitions} partition(s); add samples"
            )
        self._epochs: dict[tuple[int, int], _Epoch] = {}

    def runs(self, start: int, stop: int) -> list[Run]:
        """The runs that make up positions `[start, stop)`, in order."""
        if not self._per_batch:
            return list(self._partition_runs(0, start, stop))
        found: list[Run] = []
        per = self._per_batch
        while start < stop:
            # position = (batch * partitions + partition) * per + place: one step of this loop stays inside one's part
            part, place = divmod(start, per)
            batch, partition = divmod(part, self.partitions)
            count = min(stop - start, per - place)
            own = batch * per + place
            found += self._partition_runs(partition, own, own + count)
            start += count
        return found

    def blocks(self, key: WindowKey) -> Int[Tensor, "blocks"]:
        """Block numbers of a window, in the window's order."""
        epoch = self._epoch(key.partition, key.epoch)
        return epoch.blocks[key.number * self.window : (key.number + 1) * self.window].to(torch.int64)

    def following(self, key: WindowKey) -> WindowKey:
        """The window that is read after this one: of the same epoch, or the next one's first."""
        if key.number + 2 < len(self._epoch(key.partition, key.epoch).starts):
            return key._replace(number=key.number + 1)
        return WindowKey(key.partition, key.epoch + 1, 0)

    def rows(self, key: WindowKey) -> Int[Tensor, "rows"]:
        """The shuffle of a window: entry i is a row of the concatenation of `blocks(key)`."""
        starts = self._epoch(key.partition, key.epoch).starts
        ids = torch.arange(int(starts[key.number + 1] - starts[key.number]))
        if not self.shuffle:
            return ids
        return mix64(ids ^ seed_of(self.seed, "order", "rows", *key)).argsort()

    def locate(self, start: int, stop: int) -> tuple[Int[Tensor, "count"], Int[Tensor, "count"]]:
        """Block and row within the block of each position in `[start, stop)`."""
        found_blocks, found_rows = [], []
        for run in self.runs(start, stop):
            blocks = self.blocks(run.window)
            ends = self._sizes[blocks].cumsum(0, dtype=torch.int64)
            rows = self.rows(run.window)[run.first : run.first + run.count]
            which = torch.searchsorted(ends, rows, right=True)
            found_blocks.append(blocks[which])
            found_rows.append(rows - (ends - self._sizes[blocks])[which])
        if not found_blocks:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        return torch.cat(found_blocks), torch.cat(found_rows)

    def _split_blocks(self) -> Iterator[Int[Tensor, "blocks"] | None]:
        if self.partitions == 1:
            yield None  # all blocks, without a copy of their numbers
            return
        dealt = mix64(torch.arange(len(self._sizes)) ^ seed_of(self.seed, "order", "lanes")).argsort()
        for partition in range(self.partitions):
            yield dealt[partition :: self.partitions].sort().values

    def _partition_runs(self, partition: int, start: int, stop: int) -> Iterator[Run]:
        while start < stop:
            number, place = divmod(start, self._partition_samples[partition])
            starts = self._epoch(partition, number).starts
            index = int(torch.searchsorted(starts, place, right=True)) - 1
            count = min(stop - start, int(starts[index + 1]) - place)
            yield Run(WindowKey(partition, number, index), place - int(starts[index]), count)
            start += count

    def _epoch(self, partition: int, number: int) -> _Epoch:
        if (found := self._epochs.get((partition, number))) is not None:
            return found
        # Two epochs are alive at an edge: the one being read ahead and the one being finished.
        for key in [key for key in self._epochs if key[0] == partition][:-1]:
            del self._epochs[key]
        made = self._epochs[partition, number] = self._sort(partition, number)
        return made

    def _sort(self, partition: int, number: int) -> _Epoch:
        ids = self._partition_blocks[partition]
        count = len(self._sizes) if ids is None else len(ids)
        if self.shuffle:
            key = seed_of(self.seed, "order", "blocks", partition, number)
            hashed = torch.empty(count, dtype=torch.int64)
            for at in range(0, count, _CHUNK):  # the mixing makes several temporaries: keep them small
                end = min(at + _CHUNK, count)
                hashed[at:end] = mix64((torch.arange(at, end) if ids is None else ids[at:end]) ^ key)
            order = hashed.argsort()
            blocks = (order if ids is None else ids[order]).to(torch.int32)
            del hashed, order
        else:
            blocks = (torch.arange(count) if ids is None else ids).to(torch.int32)
        ends = self._sizes[blocks].cumsum(0, dtype=torch.int64)
        last = ends[self.window - 1 :: self.window]
        if count % self.window:
            last = torch.cat([last, ends[-1:]])
        return _Epoch(blocks, torch.cat([torch.zeros(1, dtype=torch.int64), last]))
