"""The values that travel between layers: batches into a model, losses out of it."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from tokscale.base.shapes import Bool, Int, UInt8

TEXT_EMBEDS = "text_embeds"
"""In `TokenBatch.extra`: a frozen text encoder's states, `[batch, words, width]`, of any float type."""
TEXT_EMBEDS_MASK = "text_embeds_mask"
"""In `TokenBatch.extra`: True at the real ones of `TEXT_EMBEDS`, `[batch, words]`."""
LABELS = "labels"
"""In `TokenBatch.extra`: class numbers, `[batch]`."""
LOWRES_CODES = "codes.low"
"""In `TokenBatch.extra`, and as a stream of token shards: codes of the same image at a lower resolution."""

SOFT_TARGETS = "soft_targets"
"""In `TokenBatch.extra`: the distribution of each code, `[batch, *code_shape, vocab]`: soft targets of the loss."""


@dataclass(frozen=True)
class Batch:
    """Samples of one rank. Every tensor's and sequence's first axis is the sample.

    `positions` are places in the canonical order of the data set: they do not depend on the number of ranks, so
    per-sample randomness (condition drop, caption choice) is drawn from them, see `base.rng.uniform_at`.
    """

    positions: Int[Tensor, "batch"]

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device) -> Self:
        """The same batch with its tensors on `device`."""
        return self._map(lambda value: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value)

    def pinned(self) -> Self:
        """The same batch with its host tensors in pinned memory, from where a CUDA device copies without a wait."""
        return self._map(lambda value: value.pin_memory() if isinstance(value, Tensor) and value.is_cpu else value)

    def tensors(self) -> list[Tensor]:
        """All of its tensors."""
        values = [getattr(self, item.name) for item in dataclasses.fields(self)]
        parts = [part for value in values for part in (value.values() if isinstance(value, Mapping) else [value])]
        return [part for part in parts if isinstance(part, Tensor)]

    def split(self, parts: int) -> list[Self]:
        """`parts` equal micro batches, in order.

        Raises:
            ValueError: When the batch does not divide.
        """
        if len(self) % parts:
            raise ValueError(f"a batch of {len(self)} samples does not split into {parts} equal micro batches")
        size = len(self) // parts
        return [self._map(lambda value, at=at: value[at : at + size]) for at in range(0, len(self), size)]

    def _map(self, change: Any) -> Self:
        changed = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Mapping):
                changed[item.name] = {key: change(entry) for key, entry in value.items()}
            elif value is not None:
                changed[item.name] = change(value)
        return dataclasses.replace(self, **changed)


@dataclass(frozen=True)
class ImageBatch(Batch):
    """Images, with their captions where a model reads them (CLIP)."""

    pixels: UInt8[Tensor, "batch channels height width"]
    keys: Sequence[str] = ()
    text: Int[Tensor, "batch text"] | None = None
    text_mask: Bool[Tensor, "batch text"] | None = None


@dataclass(frozen=True)
class TokenBatch(Batch):
    """Images as codes and captions as ids: what the transformers train on."""

    text: Int[Tensor, "batch text"]
    """Caption ids, right-padded with the text tokenizer's pad id (0)."""
    text_mask: Bool[Tensor, "batch text"]
    """True at real caption tokens."""
    codes: Int[Tensor, "batch *code_shape"]
    """Image codes in the tokenizer's own shape: `grid_h grid_w`, or `grid_h grid_w levels`."""
    keys: Sequence[str] = ()
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Further per-sample tensors by name: `LOWRES_CODES`, `TEXT_EMBEDS`, `LABELS`, `SOFT_TARGETS`."""


@dataclass(frozen=True)
class LossOutput:
    """What a model's forward pass gives the engine.

    `total` is the weighted sum of `parts`; both are means over this micro batch. `metrics` are detached scalars
    worth plotting (accuracy, codebook perplexity), averaged over micro batches and ranks by the loop.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    weights: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepOutcome:
    """What the ranks told each other in one optimizer update."""

    applied: bool
    """False when the loss or gradient was not finite on some rank: nothing was updated, on any rank."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    carried: Mapping[str, float] = field(default_factory=dict)
    """What the engine was asked to carry (`Engine.carry`), as means over ranks."""
    several: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What it carried as several numbers, as sums over ranks."""


class StepReport:
    """One optimizer update that was queued. What became of it is on its way: all but `lr` waits for the device."""

    def __init__(self, lr: float, read: Callable[[], StepOutcome], carries: Collection[str] = ()):
        """Promise an outcome.

        Args:
            lr: Learning rate of the first parameter group at this update.
            read: Waits for the outcome; called once.
            carries: Names in the outcome's `carried` and `several`, known without waiting.
        """
        self.lr = lr
        self.carries = frozenset(carries)
        self._read = read

    @cached_property
    def outcome(self) -> StepOutcome:
        """What became of the update. The first look waits."""
        return self._read()

    @property
    def known(self) -> bool:
        """Whether the outcome has been looked at already."""
        return "outcome" in self.__dict__

    @property
    def applied(self) -> bool:
        """See `StepOutcome`."""
        return self.outcome.applied

    @property
    def grad_norm(self) -> float:
        """See `StepOutcome`."""
        return self.outcome.grad_norm


class Carried(Mapping[str, float]):
    """Metrics that an engine carried, averaged over ranks. The first look at a value waits for the device."""

    def __init__(self, report: StepReport, names: Collection[str], prefix: str = ""):
        """Those of one report: `names` as the engine carried them, shown with a prefix."""
        self.report = report
        self._names = {prefix + name: name for name in names}

    def __getitem__(self, name: str) -> float:
        return self.report.outcome.carried[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class StepResult:
    """What one training step of a task did: metrics already averaged over micro batches."""

    metrics: Mapping[str, float]
    """Of this rank, unless `averaged`."""
    reports: Mapping[str, StepReport]
    """By engine name."""
    averaged: bool = False
    """Whether metrics are means over ranks already, as `Carried` ones are: nothing looks at those before the next step
    is queued. The loop averages others, in a message of its own."""
