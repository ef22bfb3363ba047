"""Block layouts of sparse attention: which block of keys each block of queries sees.

Option names and layouts are those of DeepSpeed 0.19.6's `deepspeed.ops.sparse_attention.sparsity_config`, the last
release that had them, with two repairs. A causal layout never shows a future block (there, `Variable`'s random blocks
did), and random blocks come from the caller's stream rather than the process-wide `random`. `attention` and
`num_heads` are not options here: they follow the stack. Inside a diagonal block the pattern's token-level order holds.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from tokscale.base.config import Config
from tokscale.base.errors import ConfigError
from tokscale.base.shapes import Bool, Tensor

BlockTable = Bool[Tensor, "heads query_blocks key_blocks"]


@dataclass(frozen=True)
class BlockGrid:
    """What a layout is made for."""

    blocks: int
    """Blocks per sequence; the last one may be ragged."""
    heads: int
    text_blocks: int
    """Leading blocks that hold text."""
    causal: bool


class _Layout(Config):
    block: PositiveInt = 16
    """Positions per block. 16 is the original's; kernels for GPUs need at least 64 to save anything, best 128."""
    seed: int = 0
    """Base of the random stream, for layouts that have random blocks. Kept in the config, so that a layout is the same
    on all ranks and after a resume; each attention function has its own stream below it."""

    def make(self, grid: BlockGrid, rng: random.Random) -> BlockTable:
        """The layout for `grid`: True where a block of keys is visible. `rng` decides random blocks.

        Raises:
            ConfigError: When the sequence has fewer blocks than the layout needs.
        """
        table = torch.zeros(grid.heads, grid.blocks, grid.blocks, dtype=torch.bool, device="cpu")
        for head in range(grid.heads if self._per_head() else 1):
            self._fill(table[head], head, grid, rng)
        if not self._per_head():
            table[1:] = table[0]
        return table.tril() if grid.causal else table

    def _per_head(self) -> bool:
        return False

    def _fill(self, table: Bool[Tensor, "query_blocks key_blocks"], head: int, grid: BlockGrid, rng: random.Random):
        raise NotImplementedError


class _PerHead(_Layout):
    different_layout_per_head: bool = False
    """Draw or shift the layout for each head, instead of sharing one."""

    def _per_head(self) -> bool:
        return self.different_layout_per_head


class DenseLayout(_PerHead):
    """Every block."""

    kind: Literal["dense"] = "dense"

    def _fill(self, table: Tensor, head: int, grid: BlockGrid, rng: random.Random) -> None:
        table[:] = True


class FixedLayout(_PerHead):
    """Local windows, and representative blocks of each window that everyone sees (arXiv:1904.10509)."""

    kind: Literal["fixed"] = "fixed"
    num_local_blocks: PositiveInt = 4
    """Blocks per local window; windows do not overlap."""
    num_global_blocks: PositiveInt = 1
    """Consecutive blocks that stand for their window, counted from its end."""
    horizontal_global_attention: bool = False
    """Global blocks also see every block. Bidirectional only."""
    num_different_global_patterns: PositiveInt = 1
    """Number of different choices of the global block over the heads."""

    @model_validator(mode="after")
    def _check(self) -> "FixedLayout":
        if self.num_local_blocks % self.num_global_blocks:
            raise ValueError(
                f"num_local_blocks={self.num_local_blocks} is not a multiple of "
                f"num_global_blocks={self.num_global_blocks}"
            )
        if self.num_different_global_patterns > 1 and not self.different_layout_per_head:
            raise ValueError(
                "num_different_global_patterns > 1 needs heads that differ; give different_layout_per_head=true"
            )
        choices = self.num_local_blocks // self.num_global_blocks
        if self.num_different_global_patterns > choices:
            raise ValueError(
                f"num_different_global_patterns={self.num_different_global_patterns}: a window of "
                f"{self.num_local_blocks} blocks has {choices} choices of {self.num_global_blocks} global ones"
            )
        return self

    def _fill(self, table: Tensor, head: int, grid: BlockGrid, rng: random.Random) -> None:
        _refuse_horizontal(self.horizontal_global_attention, grid)
        for start, stop in _windows((self.num_local_blocks,), grid.blocks):
            table[start:stop, start:stop] = True
        first = self.num_local_blocks - (1 + head % self.num_different_global_patterns) * self.num_global_blocks
        for window in range(0, grid.blocks, self.num_local_blocks):
            start = window + first
            if window + self.num_local_blocks > grid.blocks:  # a short last window moves its global blocks to fit
                start = min(start, grid.blocks - self.num_global_blocks)
            _globals(table, start, start + self.num_global_blocks, grid, rows=self.horizontal_global_attention)


class VariableLayout(_PerHead):
    """Windows of chosen sizes, chosen global blocks, random blocks. The original's sparse attention."""

    kind: Literal["variable"] = "variable"
    num_random_blocks: int | None = Field(default=None, ge=0)
    """Random blocks per row of blocks. None: a quarter of the blocks, as in the original."""
    local_window_blocks: tuple[PositiveInt, ...] = (4,)
    """Sizes of consecutive local windows; the last size repeats."""
    global_block_indices: tuple[NonNegativeInt, ...] | None = None
    """Blocks that everyone sees. None: the blocks that hold text."""
    global_block_end_indices: tuple[PositiveInt, ...] | None = None
    """Exclusive ends, which turn each index into a range."""
    horizontal_global_attention: bool = False
    """Global blocks also see every block. Bidirectional only."""

    @model_validator(mode="after")
    def _check(self) -> "VariableLayout":
        _check_ranges(self.global_block_indices, self.global_block_end_indices)
        if not self.local_window_blocks:
            raise ValueError("local_window_blocks: at least one window size is needed")
        return self

    def _fill(self, table: Tensor, head: int, grid: BlockGrid, rng: random.Random) -> None:
        _refuse_horizontal(self.horizontal_global_attention, grid)
        count = grid.blocks // 4 if self.num_random_blocks is None else self.num_random_blocks
        _scatter(table, count, grid, rng, lambda row: range(grid.blocks))
        for start, stop in _windows(self.local_window_blocks, grid.blocks):
            table[start:stop, start:stop] = True
        for start, stop in _ranges(self.global_block_indices, self.global_block_end_indices, grid):
            _globals(table, start, stop, grid, rows=self.horizontal_global_attention)


class BigBirdLayout(_PerHead):
    """A sliding window, the first blocks global, a few random blocks (arXiv:2007.14062)."""

    kind: Literal["bigbird"] = "bigbird"
    num_random_blocks: int = Field(default=1, ge=0)
    """Random blocks per row; where a causal row has fewer blocks before it, all of those."""
    num_sliding_window_blocks: PositiveInt = 3
    """Width of the window around the diagonal."""
    num_global_blocks: int = Field(default=1, ge=0)
    """Leading blocks that everyone sees and that see everyone."""

    def _fill(self, table: Tensor, head: int, grid: BlockGrid, rng: random.Random) -> None:
        _need(grid, "num_global_blocks", self.num_global_blocks)
        _scatter(table, self.num_random_blocks, grid, rng, lambda row: range(row + 1 if grid.causal else grid.blocks))
        _slide(table, self.num_sliding_window_blocks, grid)
        table[: self.num_global_blocks] = True
        table[:, : self.num_global_blocks] = True


class BSLongformerLayout(_PerHead):
    """A sliding window and chosen global blocks (arXiv:2004.05150)."""

    kind: Literal["bslongformer"] = "bslongformer"
    num_sliding_window_blocks: PositiveInt = 3
    """Width of the window around the diagonal."""
    global_block_indices: tuple[NonNegativeInt, ...] | None = None
    """Blocks that everyone sees and that see everyone. None: the blocks that hold text."""
    global_block_end_indices: tuple[PositiveInt, ...] | None = None
    """Exclusive ends, which turn each index into a range."""

    @model_validator(mode="after")
    def _check(self) -> "BSLongformerLayout":
        _check_ranges(self.global_block_indices, self.global_block_end_indices)
        return self

    def _fill(self, table: Tensor, head: int, grid: BlockGrid, rng: random.Random) -> None:
        _slide(table, self.num_sliding_window_blocks, grid)
        for start, stop in _ranges(self.global_block_indices, self.global_block_end_indices, grid):
            table[start:stop] = True
            table[:, start:stop] = True


class LocalSlidingWindowLayout(_Layout):
    """A sliding window and nothing else."""

    kind: Literal["local_sliding_window"] = "local_sliding_window"
    num_sliding_window_blocks: PositiveInt = 3
    """Width of the window around the diagonal; a causal row sees its first half."""

    def _fill(self, table: Tensor, head: int, grid: BlockGrid, rng: random.Random) -> None:
        _slide(table, self.num_sliding_window_blocks, grid)


SparseLayout = Annotated[
    DenseLayout | FixedLayout | VariableLayout | BigBirdLayout | BSLongformerLayout | LocalSlidingWindowLayout,
    Field(discriminator="kind"),
]


def _windows(sizes: tuple[int, ...], blocks: int) -> Iterator[tuple[int, int]]:
    start, index = 0, 0
    while start < blocks:
        size = sizes[min(index, len(sizes) - 1)]
        yield start, min(start + size, blocks)
        start, index = start + size, index + 1


def _scatter(table: Tensor, count: int, grid: BlockGrid, rng: random.Random, choices: Callable[[int], range]) -> None:
    _need(grid, "num_random_blocks", count)
    for row in range(grid.blocks):
        columns = choices(row)
        table[row, rng.sample(columns, min(count, len(columns)))] = True


def _slide(table: Tensor, width: int, grid: BlockGrid) -> None:
    _need(grid, "num_sliding_window_blocks", width)
    for row in range(grid.blocks):
        table[row, max(0, row - width // 2) : row + width // 2 + 1] = True


def _globals(table: Tensor, start: int, stop: int, grid: BlockGrid, *, rows: bool) -> None:
    table[start if grid.causal else 0 :, start:stop] = True
    if rows:
        table[start:stop] = True


def _ranges(
    starts: tuple[int, ...] | None, stops: tuple[int, ...] | None, grid: BlockGrid
) -> Iterator[tuple[int, int]]:
    if starts is None:
        starts = tuple(range(grid.text_blocks))
    for start, stop in zip(starts, stops or [start + 1 for start in starts], strict=True):
        if start < grid.blocks:
            yield start, min(stop, grid.blocks)


def _need(grid: BlockGrid, option: str, count: int) -> None:
    if count > grid.blocks:
        raise ConfigError(f"sparse.{option}: got {count}, but the sequence has only {grid.blocks} blocks")


def _refuse_horizontal(horizontal: bool, grid: BlockGrid) -> None:
    if horizontal and grid.causal:
        raise ConfigError("sparse.horizontal_global_attention: only a bidirectional stack can honour it")


def _check_ranges(starts: tuple[int, ...] | None, stops: tuple[int, ...] | None) -> None:
    if any(start < 0 for start in starts or ()):
        raise ValueError(f"global_block_indices: got {starts}; blocks are counted from 0")
    if stops is None:
        return
    if starts is None or len(starts) != len(stops):
        raise ValueError(
            f"global_block_end_indices: got {len(stops)} ends for {len(starts or ())} global_block_indices"
        )
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        raise ValueError(f"global_block_end_indices: {stops} must lie beyond global_block_indices {starts}")
