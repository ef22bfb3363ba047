"""Who else is there: the process group behind one small object.

There is one process group. Its accelerator's backend carries tensors; its CPU backend, which connects ranks only when
they first speak, carries control messages (objects, flags, barriers) along a tree, see `tree`, with a long timeout, so
that a slow file system never trips the accelerator's watchdog.
"""

import copy
import datetime
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather as all_gather_with_gradient

from tokscale.base.errors import TokscaleError
from tokscale.base.protocols import Collectives
from tokscale.dist.device import choose_device
from tokscale.dist.env import ProcessEnv, export
from tokscale.dist.slurm import note_joined
from tokscale.dist.tree import Line, Traffic, connect_lazily

T = TypeVar("T")
R = TypeVar("R")
_Report = tuple[int, type[BaseException], str] | None
"""Rank, kind and message of a failure."""


class Comm(Collectives):
    """Collectives of one job. With a world of one every call is local and torch.distributed is never started."""

    def __init__(self, env: ProcessEnv, device: torch.device | None = None, timeout_minutes: float = 60.0):
        """Join the job. Collective: every rank constructs one, once.

        Args:
            env: Who this process is.
            device: Where tensors live; by default the local rank's CUDA device, or the CPU.
            timeout_minutes: How long a control message may wait for the slowest rank.
        """
        self.env = env
        self.rank, self.world = env.rank, env.world
        if device is None:
            cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
            device = choose_device("cuda" if cuda else "cpu", env.local_rank)
        self.device = device
        self._own = False
        self._tags = itertools.count(1)
        self.traffic = Traffic()
        """Control messages that this rank has sent."""
        self._line = self._new_line()
        if self.world > 1:
            export(env)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            if not torch_dist.is_initialized():
                connect_lazily()
                backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
                timeout = datetime.timedelta(minutes=timeout_minutes)
                torch_dist.init_process_group(backend, rank=env.rank, world_size=env.world, timeout=timeout)
                self._own = True
            self.barrier()  # all have met
            if self.is_main:
                note_joined()

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            self._line.reduce(None, lambda mine, theirs: None)
            self._line.tell(None)

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value on every rank. Only our own ranks talk here, so pickling is safe."""
        return value if self.world == 1 else self._line.tell(value)

    def on_main(self, what: str, make: Callable[[], T]) -> T:
        """One rank looks, and tells the others: what rank 0 makes, on every rank, by one broadcast.

        Args:
            what: It is doing, for the message of a failure, which is raised on all.
            make: Called on rank 0 alone; no collective.
        """
        return self.decide(what, None, lambda nothing: make(), gather=False)

    def decide(self, what: str, mine: T, judge: Callable[[list[T]], R], *, gather: bool = True) -> R:
        """What rank 0 makes of every rank's value, on every rank. Costs one way up the tree and one down.

        Args:
            what: As `on_main`.
            mine: This rank's value.
            judge: Of all values in rank order; called on rank 0 alone; no collective.
            gather: False when rank 0 needs nobody's value; it is given an empty list then.
        """
        if self.world == 1:
            return judge([mine])
        values = self._line.gather(mine) if gather else None
        made, report, failure = None, None, None
        if self.is_main:
            try:
                made = judge(values or [])
            except Exception as error:
                failure, report = error, self._report(error)
        made, report = self._line.tell((made, report))
        self._raise(what, report, failure)
        return made  # pyright: ignore[reportReturnType] - nothing failed, so it was made

    def gather_to_main(self, value: T) -> list[T] | None:
        """Every rank's value, in rank order, on rank 0; None elsewhere."""
        return [value] if self.world == 1 else self._line.gather(value)

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. Grows with the ranks: for small values, and seldom."""
        return [value] if self.world == 1 else self._line.tell(self._line.gather(value))

    def first(self, value: T | None) -> T | None:
        """The value of the first rank that has one, on every rank; None when no rank has."""
        if self.world == 1:
            return value
        found = self._line.reduce(None if value is None else (self.rank, value), _lower)
        found = self._line.tell(found)
        return None if found is None else found[1]

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Mean over ranks of each value; every rank must pass the same keys."""
        return {key: total / self.world for key, total in self.sum(values).items()}

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum over ranks of each value, in float64."""
        if self.world == 1 or not values:
            return dict(values)
        own = {key: float(value) for key, value in values.items()}
        total = self._line.reduce(own, lambda mine, theirs: {key: mine[key] + theirs[key] for key in mine})
        return self._line.tell(total)

    def max(self, value: float) -> float:
        """The largest value of any rank: flags, deadlines, peak memory."""
        return value if self.world == 1 else self._line.tell(self._line.reduce(float(value), max))

    @contextmanager
    def raise_together(self, what: str) -> Iterator[None]:
        """If the block fails on any rank, it fails on every rank, with the first rank's message.

        The block must not contain collectives: a rank that failed before one would leave the others waiting.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        report = None if failure is None else self._report(failure)
        if self.world > 1:
            report = self._line.tell(self._line.reduce(report, _lower))
        self._raise(what, report, failure)

    def _report(self, error: BaseException) -> _Report:
        kind = type(error) if isinstance(error, TokscaleError) else TokscaleError
        return self.rank, kind, f"{error}"

    def _raise(self, what: str, report: _Report, own: BaseException | None) -> None:
        if own is not None:
            raise own
        if report is not None:
            rank, kind, message = report
            raise kind(f"{what} failed on rank {rank}: {message}")

    def duplicate_group(self) -> "Comm":
        """A second line between the same ranks, for one background thread, whose messages must never mix with ours.

        Every rank makes its lines in the same order; nothing is sent. Control messages only; closing stays with this
        object.
        """
        line = copy.copy(self)
        line._own = False
        line._line = self._new_line()
        return line

    def _new_line(self) -> Line:
        return Line(self.rank, self.world, next(self._tags), self.traffic)

    def close(self) -> None:
        """Leave the job."""
        if self._own and torch_dist.is_initialized():
            torch_dist.destroy_process_group()

    # What modules may ask of the other ranks, see base.protocols.Collectives.

    def gather_batch(self, local: Tensor) -> Tensor:
        """All ranks' rows with gradient; every rank must hold the same number of rows."""
        return local if self.world == 1 else torch.cat(all_gather_with_gradient(local.contiguous()))

    def rank_offset(self, batch: int) -> int:
        """First row of this rank in `gather_batch`'s result."""
        return self.rank * batch

    def exchange(self, message: Tensor, rank: int) -> Tensor:
        """Send `message` to another rank and receive as much from it at the same time; both call it."""
        received = torch.empty_like(message)
        operations = [
            torch_dist.P2POp(torch_dist.isend, message, rank),
            torch_dist.P2POp(torch_dist.irecv, received, rank),
        ]
        for request in torch_dist.batch_isend_irecv(operations):
            request.wait()
        return received

    def all_sum(self, local: Tensor) -> Tensor:
        """Sum over ranks without gradient."""
        if self.world == 1:
            return local
        total = local.detach().clone()
        torch_dist.all_reduce(total)
        return total


def _lower(mine: tuple[int, Any] | None, theirs: tuple[int, Any] | None) -> tuple[int, Any] | None:
    """Of two ranks' reports the one of the lower rank."""
    return min((report for report in (mine, theirs) if report is not None), key=lambda report: report[0], default=None)
