"""Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) in the form Parti trains with, exact on shards.

The second moment of a matrix is kept as a running mean over its rows and one over its columns. Under ZeRO a rank holds
a contiguous range of the matrix: it sums its range by rows and by columns, one all-reduce per group completes the
sums, and every rank keeps the same two vectors. They are smaller than the matrix by a factor of its width, so they
are not worth dividing; everything shaped like the parameter stays divided.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from tokscale.engine.config import AdafactorConfig
from tokscale.engine.fragments import Master, ParamSlice
from tokscale.engine.optimizer import Slot, optimizer
from tokscale.engine.verdict import GuardedOptimizer

TINY = 1e-30
"""Added to squared gradients (epsilon 1 of the paper)."""


@dataclass(frozen=True)
class _Block:
    """A rectangle of a matrix that lies contiguously in a range of its elements."""

    place: slice
    """Within the range."""
    rows: slice
    columns: slice

    def of(self, values: Tensor) -> Tensor:
        """The rectangle, as a matrix."""
        return values[self.place].view(self.rows.stop - self.rows.start, -1)


def blocks(start: int, count: int, width: int) -> Iterator[_Block]:
    """Cut elements `[start, start + count)` of a row-major matrix into a row's end, whole rows, and a row's start."""
    stop = start + count
    at = start
    while at < stop:
        row, column = divmod(at, width)
        whole = (stop - at) // width if column == 0 else 0
        size = whole * width if whole else min(width - column, stop - at)
        columns = slice(0, width) if whole else slice(column, column + size)
        yield _Block(slice(at - start, at - start + size), slice(row, row + max(whole, 1)), columns)
        at += size


@optimizer(AdafactorConfig)
class Adafactor(GuardedOptimizer):
    """Adafactor with a fixed learning rate, first moment, update clipping and decoupled weight decay.

    Parameters with two or more axes are matrices, first axis by the rest; those with a side below `min_factor`, and
    vectors, keep a full second moment.
    """

    def __init__(self, params: list[dict[str, Any]], config: AdafactorConfig):
        super().__init__(
            params,
            {
                "lr": config.lr,
                "betas": config.betas,
                "clip_threshold": config.clip_threshold,
                "weight_decay": 0.0,
            },
        )
        self.config = config

    @classmethod
    def slots(cls, config: AdafactorConfig, shape: tuple[int, ...], group: str) -> tuple[Slot, ...]:
        """The first moment, and the second: whole, or as means over rows and over columns, equal on all ranks."""
        del group
        if not _is_factored(config, shape):
            return Slot("exp_avg"), Slot("exp_avg_sq")
        rows, columns = _sides(shape)
        return Slot("exp_avg"), Slot("exp_avg_sq_row", (rows,)), Slot("exp_avg_sq_col", (columns,))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply one update to every master that has a gradient. Collective where masters are divided."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(self.masters[parameter], group)

    def _update(self, master: Master, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[master.data]
        step = self.next_step(state)
        # The running mean with its bias correction folded in, as in Praxis' ShardedAdafactor.
        decay = beta2 * (1 - beta2 ** (step - 1)) / (1 - beta2**step)
        update = self.gradient(master.data).reshape(-1).clone()
        self._take_in(master, update, (1 - decay).float())
        for piece in master.slices:
            self._normalise(piece, update[piece.place])
        if threshold := group["clip_threshold"]:
            self._clip(master, update, threshold)
        moment, weight = state["exp_avg"].view(-1), master.data.view(-1)
        moved = moment.lerp(update, 1 - beta1)
        decayed = weight.mul(1 - group["lr"] * group["weight_decay"])
        self.keep(weight, decayed.sub_(moved, alpha=group["lr"]))
        self.keep(moment, moved)

    def _take_in(self, master: Master, gradient: Tensor, share: Tensor) -> None:
        """Let the second moments take in a share of the squares: one message for all slices."""
        factored = [piece for piece in master.slices if _is_factored(self.config, piece.shape)]
        sums = [torch.zeros(sum(_sides(piece.shape)), device=gradient.device) for piece in factored]
        for piece, total in zip(factored, sums, strict=True):
            rows, width = _sides(piece.shape)
            squares = gradient[piece.place].square().add_(TINY)
            for block in blocks(piece.start, piece.count, width):
                rectangle = block.of(squares)
                total[:rows][block.rows] += rectangle.sum(1)
                total[rows:][block.columns] += rectangle.sum(0)
        self._all_sum(sums)
        for piece, total in zip(factored, sums, strict=True):
            rows, width = _sides(piece.shape)
            row, column = self.kept(piece, "exp_avg_sq_row"), self.kept(piece, "exp_avg_sq_col")
            self.keep(row, row.lerp(total[:rows] / width, share))
            self.keep(column, column.lerp(total[rows:] / rows, share))
        for piece in master.slices:
            if not _is_factored(self.config, piece.shape):
                full = self.kept(piece, "exp_avg_sq")
                self.keep(full, full.lerp(gradient[piece.place].square().add_(TINY), share))

    def _normalise(self, piece: ParamSlice, update: Tensor) -> None:
        """Divide a gradient by the root of its second moment, in place."""
        if not _is_factored(self.config, piece.shape):
            update.mul_(self.kept(piece, "exp_avg_sq").rsqrt())
            return
        row, column = self.kept(piece, "exp_avg_sq_row"), self.kept(piece, "exp_avg_sq_col")
        by_row, by_column = (row / row.mean()).rsqrt(), column.rsqrt()
        for block in blocks(piece.start, piece.count, _sides(piece.shape)[1]):
            block.of(update).mul_(by_row[block.rows, None]).mul_(by_column[block.columns])

    def _clip(self, master: Master, update: Tensor, threshold: float) -> None:
        """Scale down the update of each parameter whose root mean square exceeds the threshold."""
        squares = [update[piece.place].square().sum().view(1) for piece in master.slices]
        self._all_sum(squares)
        for piece, total in zip(master.slices, squares, strict=True):
            size = torch.Size(piece.shape).numel()
            update[piece.place].div_((total / size).sqrt().div_(threshold).clamp_(min=1.0))

    def _all_sum(self, values: list[Tensor]) -> None:
        """Replace each tensor by its sum over ranks, in one message."""
        if self.comm is None or not values:
            return
        packed = torch.cat(values).to(self.comm.device)
        torch_dist.all_reduce(packed)
        for value, total in zip(values, packed.split([value.numel() for value in values]), strict=True):
            value.copy_(total)


def _is_factored(config: AdafactorConfig, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and min(_sides(shape)) >= config.min_factor


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a parameter as a matrix."""
    return shape[0], torch.Size(shape).numel() // max(shape[0], 1)
