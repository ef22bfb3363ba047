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
from torch import Tensor, nn

from tokscale.dist.comm import Comm
from tokscale.engine.config import AdafactorConfig
from tokscale.engine.fragments import Master, ParamSlice

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


class Adafactor(torch.optim.Optimizer):
    """Adafactor with a fixed learning rate, first moment, update clipping and decoupled weight decay.

    Parameters with two or more axes are matrices, first axis by the rest; those with a side below `min_factor`, and
    vectors, keep a full second moment. State: `exp_avg`, and `exp_avg_sq` or `exp_avg_sq_row` and `exp_avg_sq_col`.
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
        self._min_factor = config.min_factor
        self.factors: dict[nn.Parameter, dict[str, Tensor]] = {}
        """Row and column means of each factored parameter, equal on all ranks."""
        self._full: dict[nn.Parameter, Tensor] = {}
        self._masters: dict[Tensor, Master] = {}
        self._comm: Comm | None = None

    def start(self, masters: list[Master], comm: Comm | None) -> None:
        """Make the state; `comm` is given when masters hold parts of parameters."""
        self._comm = comm if comm is not None and comm.world > 1 else None
        for master in masters:
            self._masters[master.data] = master
            device = master.data.device
            self.state[master.data] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(master.data),
            }
            for piece in master.slices:
                if self._is_factored(piece):
                    rows, columns = _sides(piece)
                    self.factors[piece.parameter] = {
                        "exp_avg_sq_row": torch.zeros(rows, device=device),
                        "exp_avg_sq_col": torch.zeros(columns, device=device),
                    }
                else:
                    self._full[piece.parameter] = torch.zeros(piece.count, device=device)

    def moments(self, master: Master, piece: ParamSlice) -> dict[str, Tensor]:
        """State shaped like this rank's part of a parameter, as flat views."""
        found = {"exp_avg": self.state[master.data]["exp_avg"].view(-1)[piece.place]}
        if not self._is_factored(piece):
            found["exp_avg_sq"] = self._full[piece.parameter]
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply one update to every master that has a gradient. Collective where masters are divided."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(self._masters[parameter], group)

    def _update(self, master: Master, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[master.data]
        state["step"] += 1
        step = state["step"].item()
        # The running mean with its bias correction folded in, as in Praxis' ShardedAdafactor.
        decay = beta2 * (1 - beta2 ** (step - 1)) / (1 - beta2**step)
        gradient = master.data.grad
        assert gradient is not None
        update = gradient.reshape(-1).clone()
        self._take_in(master, update, decay)
        for piece in master.slices:
            self._normalise(piece, update[piece.place])
        if threshold := group["clip_threshold"]:
            self._clip(master, update, threshold)
        moment = state["exp_avg"].view(-1)
        moment.lerp_(update, 1 - beta1)
        weight = master.data.view(-1)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(moment, alpha=group["lr"])

    def _take_in(self, master: Master, gradient: Tensor, decay: float) -> None:
        """Bring the second moments up to date: one message for all slices."""
        factored = [piece for piece in master.slices if self._is_factored(piece)]
        sums = [torch.zeros(sum(_sides(piece)), device=gradient.device) for piece in factored]
        for piece, total in zip(factored, sums, strict=True):
            rows, width = _sides(piece)
            squares = gradient[piece.place].square().add_(TINY)
            for block in blocks(piece.start, piece.count, width):
                rectangle = block.of(squares)
                total[:rows][block.rows] += rectangle.sum(1)
                total[rows:][block.columns] += rectangle.sum(0)
        self._all_sum(sums)
        for piece, total in zip(factored, sums, strict=True):
            rows, width = _sides(piece)
            factors = self.factors[piece.parameter]
            factors["exp_avg_sq_row"].lerp_(total[:rows] / width, 1 - decay)
            factors["exp_avg_sq_col"].lerp_(total[rows:] / rows, 1 - decay)
        for piece in master.slices:
            if not self._is_factored(piece):
                self._full[piece.parameter].lerp_(gradient[piece.place].square().add_(TINY), 1 - decay)

    def _normalise(self, piece: ParamSlice, update: Tensor) -> None:
        """Divide a gradient by the root of its second moment, in place."""
        if not self._is_factored(piece):
            update.mul_(self._full[piece.parameter].rsqrt())
            return
        factors = self.factors[piece.parameter]
        row, column = factors["exp_avg_sq_row"], factors["exp_avg_sq_col"]
        by_row, by_column = (row / row.mean()).rsqrt(), column.rsqrt()
        for block in blocks(piece.start, piece.count, _sides(piece)[1]):
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
        if self._comm is None or not values:
            return
        packed = torch.cat(values).to(self._comm.device)
        torch_dist.all_reduce(packed)
        for value, total in zip(values, packed.split([value.numel() for value in values]), strict=True):
            value.copy_(total)

    def _is_factored(self, piece: ParamSlice) -> bool:
        return len(piece.shape) > 1 and min(_sides(piece)) >= self._min_factor


def _sides(piece: ParamSlice) -> tuple[int, int]:
    """Rows and columns of a parameter as a matrix."""
    rows = piece.shape[0]
    return rows, torch.Size(piece.shape).numel() // max(rows, 1)
