"""What all engines do alike: the order of a step, and how state is handed out and taken back.

A particular engine provides the model, the optimizer, the fragments, and five operations on gradients.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokscale.base.batch import Batch, LossOutput, StepReport
from tokscale.base.protocols import ParameterAccess, using
from tokscale.base.state import ShardSource, TensorShard
from tokscale.dist.comm import Comm
from tokscale.engine.ema import Averages
from tokscale.engine.fragments import Master, StateTensor
from tokscale.engine.groups import persistent_buffers
from tokscale.engine.loading import load_held
from tokscale.engine.optim import (
    fragments_of,
    hyper_parameters,
    restore_hyper_parameters,
    set_lr,
    set_updates,
)
from tokscale.engine.optimizer import ShardedOptimizer
from tokscale.engine.schedule import Schedule


class CommonEngine(ABC):
    """Base of the engines; implements `base.protocols.Engine`."""

    optimizer: ShardedOptimizer
    replicated = False
    """True when every rank's fragments are the same whole parameters."""

    def __init__(self, name: str, model: nn.Module, *, comm: Comm, schedule: Schedule, lr: float, micro_batches: int):
        self.name = name
        self.model = model
        self.device = comm.device
        self.access = ParameterAccess()
        self.updates = 0
        self.skipped = 0
        self._comm = comm
        self._schedule = schedule
        self._lr = lr
        self._micro_batches = micro_batches
        self._losses: list[Tensor] = []
        self._names = {parameter: key for key, parameter in model.named_parameters()}

    def _finish(self, masters: list[Master], decays: tuple[float, ...]) -> None:
        """Called once model and optimizer stand: start the optimizer's state and the averages."""
        self.optimizer.start(masters, None if self.replicated else self._comm)
        self._fragments = fragments_of(self.optimizer, masters, self._names)
        self._averages = Averages(decays, self._fragments)

    # ------------------------------------------------------------------------------------------------ training

    def __call__(self, batch: Batch) -> LossOutput:
        """The model's loss on one micro batch."""
        with using(self._comm), using(self.access):
            return self._forward(batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro batch; `loss` is its mean and is divided by the number of micro batches."""
        if len(self._losses) == self._micro_batches:
            raise RuntimeError(f"engine {self.name!r}: a step has {self._micro_batches} micro batches; got one more")
        self._losses.append(loss.detach())
        with using(self._comm), using(self.access):
            self._backward(loss)

    @torch.no_grad()
    def step(self, step: int) -> StepReport:
        """Check, clip and apply the accumulated gradient, or drop it on all ranks when one met a non-finite value."""
        if len(self._losses) != self._micro_batches:
            due, seen = self._micro_batches, len(self._losses)
            raise RuntimeError(f"engine {self.name!r}: a step has {due} micro batches; got only {seen}")
        lr = self._lr * self._schedule(step)
        set_lr(self.optimizer, lr)
        norm = self._reduce()
        finite = math.isfinite(norm) and bool(torch.stack(self._losses).isfinite().all())
        self._losses.clear()
        applied = self._comm.max(not finite) == 0
        if applied:
            self._apply(norm)
            self.updates += 1
            self._averages.update(self.updates)
        else:
            self._drop()
            self.skipped += 1
        return StepReport(applied=applied, grad_norm=norm, lr=lr)

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The model with whole parameters on every rank. Collective."""
        with self._whole(), using(self._comm), using(ParameterAccess()):
            yield self.model

    @abstractmethod
    def _forward(self, batch: Batch) -> LossOutput: ...

    @abstractmethod
    def _backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def _reduce(self) -> float:
        """Average the gradient over ranks and micro batches; its global L2 norm, the same on every rank."""

    @abstractmethod
    def _apply(self, norm: float) -> None:
        """Clip by the norm, update the weights, clear the gradient."""

    @abstractmethod
    def _drop(self) -> None:
        """Clear the gradient; leave weights and moments as they are."""

    @abstractmethod
    def _whole(self) -> AbstractContextManager[Any]: ...

    # --------------------------------------------------------------------------------------------------- state

    @abstractmethod
    def _fixed(self) -> list[StateTensor]:
        """Buffers and frozen parameters."""

    @abstractmethod
    def _publish(self) -> None:
        """Bring the masters, just loaded, to wherever forward reads them."""

    def _held(self) -> Iterator[StateTensor]:
        self.optimizer.check_declared()
        for index, fragment in enumerate(self._fragments):
            slots = {"weight": fragment.weight, **fragment.moments, **dict(self._averages.slots(index))}
            for slot, data in slots.items():
                yield StateTensor(fragment.name, slot, fragment.shape, fragment.start, data, self.replicated)
        yield from self.optimizer.replicated(self._names)
        yield from self._fixed()

    def shards(self) -> Iterator[TensorShard]:
        """This rank's ranges of weights, moments, averages, frozen parameters and buffers."""
        for entry in self._held():
            start, stop = entry.share(self._comm.rank, self._comm.world)
            if start < stop:
                yield TensorShard(entry.name, entry.slot, entry.shape, entry.start + start, entry.data[start:stop])

    def scalars(self) -> Mapping[str, Any]:
        """Counters and group options: equal on all ranks, JSON-ready."""
        return {"updates": self.updates, "skipped": self.skipped, "groups": hyper_parameters(self.optimizer)}

    @torch.no_grad()
    def load(self, source: ShardSource) -> None:
        """Take over a checkpoint of any layout. Collective.

        Raises:
            CheckpointError: When it is of another model or optimizer, or damaged; on every rank.
        """
        names = [*dict(self.model.named_parameters()), *persistent_buffers(self.model)]
        load_held(source, list(self._held()), self._comm, names)
        restore_hyper_parameters(self.optimizer, source.scalars["groups"])
        self.updates, self.skipped = source.scalars["updates"], source.scalars["skipped"]
        set_updates(self.optimizer, self.updates)
        self._publish()
