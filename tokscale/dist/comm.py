"""Who else is there: the process group behind one small object.

Control messages (objects, flags, barriers) go over a CPU group with a long timeout of its own, so that a slow file
system never trips the accelerator's watchdog.
"""

import copy
import datetime
import os
from collections.abc import Iterator, Mapping
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

T = TypeVar("T")


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
        self._control: Any = None
        self._own = False
        timeout = self._timeout = datetime.timedelta(minutes=timeout_minutes)
        if self.world > 1:
            export(env)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            if not torch_dist.is_initialized():
                backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
                torch_dist.init_process_group(backend, rank=env.rank, world_size=env.world, timeout=timeout)
                self._own = True
            self._control = torch_dist.new_group(backend="gloo", timeout=timeout)
            if self.is_main:
                note_joined()

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            torch_dist.barrier(group=self._control)

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value on every rank. Only our own ranks talk here, so pickling is safe."""
        if self.world == 1:
            return value
        box = [value]
        torch_dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        boxes: list[Any] = [None] * self.world
        torch_dist.all_gather_object(boxes, value, group=self._control)
        return boxes

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Mean over ranks of each value; every rank must pass the same keys."""
        return {key: total / self.world for key, total in self.sum(values).items()}

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum over ranks of each value, in float64."""
        if self.world == 1 or not values:
            return dict(values)
        keys = sorted(values)
        packed = torch.tensor([float(values[key]) for key in keys], dtype=torch.float64)
        torch_dist.all_reduce(packed, group=self._control)
        totals = dict(zip(keys, packed.tolist(), strict=True))
        return {key: totals[key] for key in values}

    def max(self, value: float) -> float:
        """The largest value of any rank: flags, deadlines, peak memory."""
        if self.world == 1:
            return value
        box = torch.tensor([float(value)], dtype=torch.float64)
        torch_dist.all_reduce(box, op=torch_dist.ReduceOp.MAX, group=self._control)
        return box.item()

    @contextmanager
    def raise_together(self, what: str) -> Iterator[None]:
        """If the block fails on any rank, it fails on every rank, with the first rank's message.

        The block must not contain collectives: a rank that failed before one would leave the others waiting.
        """
        failure: BaseException | None = None
        try:
            yield
        except Exception as error:
            failure = error
        reports = self.gather_objects(None if failure is None else (type(failure), f"{failure}"))
        if failure is not None:
            raise failure
        for rank, report in enumerate(reports):
            if report is not None:
                kind, message = report
                kind = kind if issubclass(kind, TokscaleError) else TokscaleError
                raise kind(f"{what} failed on rank {rank}: {message}")

    def duplicate_group(self) -> "Comm":
        """A second line between the same ranks, for one background thread, whose messages must never mix with ours.

        Collective. Control messages only; closing stays with this object.
        """
        line = copy.copy(self)
        line._own = False
        if self.world > 1:
            line._control = torch_dist.new_group(backend="gloo", timeout=self._timeout)
        return line

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

    def all_sum(self, local: Tensor) -> Tensor:
        """Sum over ranks without gradient."""
        if self.world == 1:
            return local
        total = local.detach().clone()
        torch_dist.all_reduce(total)
        return total
