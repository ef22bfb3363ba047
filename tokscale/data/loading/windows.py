"""Windows of blocks in memory: what the loader reads its samples from."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokscale.base.errors import DataError
from tokscale.base.log import logger
from tokscale.data.loading.order import BlockOrder, WindowKey
from tokscale.data.tokens.blocks import Block, merge_blocks
from tokscale.data.tokens.manifest import TokenDataset
from tokscale.data.tokens.views import RowMask

log = logger("data")


@dataclass(frozen=True)
class Window:
    """The samples of some blocks, and which of them the order's rows mean."""

    block: Block
    """All samples of the window's blocks, concatenated."""
    rows: NDArray[np.int64]
    """By place in the shuffled window: row of `block`."""
    origin: "Origin"


@dataclass(frozen=True)
class Origin:
    """Which blocks of the data set a window was made of."""

    blocks: NDArray[np.int64]
    """Their numbers."""
    first_rows: NDArray[np.int64]
    """Of each, in the window."""
    first_captions: NDArray[np.int64]
    """Likewise."""

    def captions(
        self, rows: NDArray[np.int64], captions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Block of each row, and its caption's number there; -1 stays -1."""
        part = np.searchsorted(self.first_rows, rows, side="right") - 1
        return self.blocks[part], np.where(captions >= 0, captions - self.first_captions[part], -1)


class SourceReader:
    """Reads one data set along its order, a few windows in memory."""

    def __init__(
        self,
        dataset: TokenDataset,
        order: BlockOrder,
        *,
        view: RowMask | None,
        tensors: Sequence[str],
        substitutes: int = 0,
    ):
        """Read `dataset` in `order`.

        Args:
            dataset: Opened.
            order: Over the data set's blocks, sized by the view.
            view: Rows to keep, or None for all.
            tensors: Names of the tensors that are wanted.
            substitutes: How many damaged blocks may be replaced by others before it is an error.
        """
        self.dataset, self.order, self.view = dataset, order, view
        self._tensors = tensors
        self._substitutes = substitutes
        self._bad: set[int] = set()
        # A batch lies in at most two neighbouring windows of each partition at a time.
        self._windows: OrderedDict[WindowKey, Window] = OrderedDict()
        self._capacity = 2 * order.partitions

    def read(self, start: int, stop: int) -> Iterator[tuple[Block, NDArray[np.int64], Origin]]:
        """The samples at the source's own positions `[start, stop)`, as rows of windows, in order."""
        for run in self.order.runs(start, stop):
            window = self._window(run.window)
            yield window.block, window.rows[run.first : run.first + run.count], window.origin

    def _window(self, key: WindowKey) -> Window:
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        while len(self._windows) >= self._capacity:
            self._windows.popitem(last=False)
        window = self._windows[key] = self._load(key)
        return window

    def _load(self, key: WindowKey) -> Window:
        blocks, places, offset = [], [], 0
        numbers: list[int] = []
        self._expect(key)
        for number in self.order.blocks(key).tolist():
            kept = self._kept(number)
            if not len(kept):
                continue
            block, taken = self._read(number)
            damaged = taken != number
            blocks.append(block)
            numbers.append(taken)
            # A substitute may be shorter: its rows repeat, so that no other position shifts.
            places.append(offset + (np.arange(len(kept)) % len(block) if damaged else kept))
            offset += len(block)
        if self.dataset.is_remote:
            self._expect(self.order.following(key))
        rows = np.concatenate(places)[self.order.rows(key).numpy()]
        return Window(merge_blocks(blocks, self._tensors), rows, _origin(numbers, blocks))

    def _expect(self, key: WindowKey) -> None:
        if self.dataset.is_remote:
            self.dataset.expect([number for number in self.order.blocks(key).tolist() if len(self._kept(number))])

    def _kept(self, number: int) -> NDArray[np.int64]:
        if self.view is not None:
            return self.view.rows(number)
        return np.arange(int(self.dataset.sizes[number]))

    def _read(self, number: int) -> tuple[Block, int]:
        """The block, or its substitute, the next block by number that can be read; and the number of what was read."""
        count = len(self.dataset.sizes)
        for candidate in range(number, number + count):
            try:
                return self.dataset.read(candidate % count), candidate % count
            except DataError as error:
                self._bad.add(candidate % count)
                if len(self._bad) > self._substitutes:
                    limit = f" ({len(self._bad)} damaged blocks, {self._substitutes} may be substituted)"
                    raise DataError(f"{error}{limit if self._substitutes else ''}") from None
                log.warning("%s; other samples take its place (%d so far)", error, len(self._bad))
        raise DataError(f"{self.dataset.folder}: no block can be read")


def _origin(numbers: Sequence[int], blocks: Sequence[Block]) -> Origin:
    rows = [len(block) for block in blocks[:-1]]
    captions = [int(block.tensors["cap_row"][-1]) for block in blocks[:-1]]
    return Origin(np.array(numbers, np.int64), np.cumsum([0, *rows]), np.cumsum([0, *captions]))
