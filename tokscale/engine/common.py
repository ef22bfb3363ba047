"""What all engines do alike: the order of a step, and how state is handed out and taken back.

A particular engine provides the model, the optimizer, the fragments, and five operations on gradients.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokscale.base.batch import Batch, LossOutput, StepOutcome, StepReport
from tokscale.base.protocols import ParameterAccess, RegionCompiler, using
from tokscale.base.state import ShardSource, TensorShard
from tokscale.dist.comm import Comm
from tokscale.dist.message import Message, Value
from tokscale.engine.ema import Averages
from tokscale.engine.fragments import Master, StateTensor, parts_of
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
from tokscale.engine.verdict import SQUARES, UNUSABLE, Verdict, guarded, instruct

_GROUP = "engine/group/"
"""In a step's message: the squared norm of the gradient of a group of parameters."""
_MOST_UNREAD = 16
"""Reports that may wait to be looked at; the oldest is then long there."""


class CommonEngine(ABC):
    """Base of the engines; implements `base.protocols.Engine`."""

    optimizer: ShardedOptimizer
    keep_options = False
    replicated = False
    """True when every rank's fragments are the same whole parameters."""
    gradient_group: Callable[[str], str] | None = None
    """From a parameter's name to its group's, where somebody reads `gradient_norms`; the same on every rank."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        comm: Comm,
        schedule: Schedule,
        lr: float,
        micro_batches: int,
        regions: RegionCompiler,
    ):
        self.name = name
        self.model = model
        self.device = comm.device
        self.access = ParameterAccess()
        self._regions = regions
        self._updates = self._skipped = 0
        self._unread: list[StepReport] = []
        self._last_report: StepReport | None = None
        self._carried: dict[str, Value] = {}
        self._comm = comm
        self._schedule = schedule
        self._lr = lr
        self._micro_batches = micro_batches
        self._losses: list[Tensor] = []
        self._names = {parameter: key for key, parameter in model.named_parameters()}

    def _finish(self, masters: list[Master], decays: tuple[float, ...]) -> None:
        """Called once model and optimizer stand: start the optimizer's state and the averages."""
        self._masters = masters
        self.optimizer.start(masters, None if self.replicated else self._comm)
        guarded(self.optimizer)
        self._fragments = fragments_of(self.optimizer, masters, self._names)
        self._averages = Averages(decays, masters, self.device)
        self._masters_on = masters[0].data.device if masters else self.device

    # ------------------------------------------------------------------------------------------------ training

    def __call__(self, batch: Batch) -> LossOutput:
        """The model's loss on one micro batch."""
        with using(self._comm), using(self.access), using(self._regions):
            return self._forward(batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro batch; `loss` is its mean and is divided by the number of micro batches."""
        if len(self._losses) == self._micro_batches:
            raise RuntimeError(f"engine {self.name!r}: a step has {self._micro_batches} micro batches; got one more")
        self._losses.append(loss.detach())
        with using(self._comm), using(self.access), using(self._regions):
            self._backward(loss)

    def carry(self, values: Mapping[str, Value]) -> None:
        """Let the next step's message carry these too: scalars as means over ranks, sequences as sums."""
        self._carried.update(values)

    @torch.no_grad()
    def step(self, step: int) -> StepReport:
        """Clip and apply the accumulated gradient; a value that is not finite, on any rank, lets all change nothing.

        One message tells all ranks; the device acts on it, and the host may read it when it likes.
        """
        if len(self._losses) != self._micro_batches:
            due, seen = self._micro_batches, len(self._losses)
            raise RuntimeError(f"engine {self.name!r}: a step has {due} micro batches; got only {seen}")
        lr = self._lr * self._schedule(step)
        set_lr(self.optimizer, lr)
        carried, self._carried = self._carried, {}
        pieces = self._reduce()
        norm = torch.nn.utils.get_total_norm(pieces)
        if self.gradient_group is not None:
            carried |= self._group_squares(pieces, self.gradient_group)
        # Where every rank has the whole gradient, one of them speaks for all.
        squares = norm.double().square()
        if self.replicated and not self._comm.is_main:
            squares = torch.zeros_like(squares)
        unusable = ~torch.stack(self._losses).isfinite().all()
        self._losses.clear()
        message = Message(self._comm, {SQUARES: squares.to(self.device), UNUSABLE: unusable, **carried})
        verdict = Verdict.of(message)
        instruct(self.optimizer, verdict, self._divided_to, self._masters_on)
        self._apply(verdict)
        self._averages.update(verdict.found_inf)
        return self._expect(StepReport(lr, partial(self._outcome, message, carried), carried))

    def _expect(self, report: StepReport) -> StepReport:
        self._last_report = report
        self._unread = [*(waiting for waiting in self._unread if not waiting.known), report]
        if len(self._unread) > _MOST_UNREAD:
            _ = self._unread.pop(0).outcome
        return report

    def _outcome(self, message: Message, carried: Mapping[str, Value]) -> StepOutcome:
        totals, world = message.totals, self._comm.world
        squares = totals[SQUARES]
        applied = math.isfinite(squares) and totals[UNUSABLE] == 0
        self._updates += applied
        self._skipped += not applied
        several = {name: message.several(name) for name, value in carried.items() if isinstance(value, Sequence)}
        means = {name: totals[name] / world for name in carried if name not in several}
        return StepOutcome(applied=applied, grad_norm=math.sqrt(squares), carried=means, several=several)

    def _group_squares(self, pieces: list[Tensor], group_of: Callable[[str], str]) -> dict[str, Tensor]:
        """Squared norms by group, so that their mean over ranks is that of the whole gradient."""
        trained = [name for parameter, name in self._names.items() if parameter.requires_grad]
        found = {_GROUP + group_of(name): torch.zeros((), device=self.device, dtype=torch.float64) for name in trained}
        for parameter, gradient in self._located(pieces):
            found[_GROUP + group_of(self._names[parameter])] += gradient.double().square().sum().to(self.device)
        return found if self.replicated else {name: value * self._comm.world for name, value in found.items()}

    def _located(self, pieces: list[Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        if self.replicated:
            yield from ((parameter, parameter.grad) for parameter in self._names if parameter.grad is not None)
        else:
            yield from parts_of(self._masters, pieces)

    @property
    def gradient_norms(self) -> dict[str, float]:
        """L2 norm of the last step's gradient before clipping, by `gradient_group`. Waits for that step."""
        carried = self._last_report.outcome.carried if self._last_report is not None else {}
        return {name.removeprefix(_GROUP): math.sqrt(of) for name, of in carried.items() if name.startswith(_GROUP)}

    def _settle(self) -> None:
        """Wait for what became of every step so far."""
        for report in self._unread:
            _ = report.outcome
        self._unread.clear()

    @property
    def updates(self) -> int:
        """Steps that changed the weights. Waits for the last one."""
        self._settle()
        return self._updates

    @property
    def skipped(self) -> int:
        """Steps that changed nothing, since something was not finite. Waits for the last one."""
        self._settle()
        return self._skipped

    @contextmanager
    def gathered(self, *, by_module: bool = False) -> Iterator[nn.Module]:
        """The model with whole parameters on every rank, or with those of one module at a time. Collective."""
        access = self.access if by_module else ParameterAccess()
        with self._whole(by_module), using(self._comm), using(access), using(RegionCompiler()):
            yield self.model

    def bytes_to_gather(self) -> int:
        """None: nothing is sharded, unless an engine says otherwise."""
        return 0

    @contextmanager
    def averaged(self, slot: str) -> Iterator[None]:
        """The weights replaced by one of their averages, e.g. `ema/0.999`, for measuring and drawing. Collective."""
        self._settle()
        self._averages.swap(slot)
        try:
            self._publish()
            yield
        finally:
            self._averages.swap(slot)
            self._publish()

    @abstractmethod
    def _forward(self, batch: Batch) -> LossOutput: ...

    @abstractmethod
    def _backward(self, loss: Tensor) -> None: ...

    @property
    @abstractmethod
    def _divided_to(self) -> float:
        """The norm to which the optimizer divides gradients as it reads them; 0 when they are clipped beforehand."""

    @abstractmethod
    def _reduce(self) -> list[Tensor]:
        """Average the gradient over ranks and micro batches; what this rank has of it, in pieces."""

    @abstractmethod
    def _apply(self, verdict: Verdict) -> None:
        """Update the weights, as the optimizer was told to; clear the gradient."""

    @abstractmethod
    def _whole(self, by_module: bool) -> AbstractContextManager[Any]: ...

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
        restore_hyper_parameters(self.optimizer, source.scalars["groups"], keep=self.keep_options)
        self._settle()
        self._updates, self._skipped = source.scalars["updates"], source.scalars["skipped"]
        set_updates(self.optimizer, self._updates)
        self._averages.set_updates(self._updates)
        self._publish()
