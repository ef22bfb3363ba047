"""The values that travel between layers: batches into a model, losses out of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
"""In `TokenBatch.extra`, and as a stream of token shards: codes of the same picture at a lower resolution."""

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
    """Pictures, with their captions where a model reads them (CLIP)."""

    pixels: UInt8[Tensor, "batch channels height width"]
    keys: Sequence[str] = ()
    text: Int[Tensor, "batch text"] | None = None
    text_mask: Bool[Tensor, "batch text"] | None = None


@dataclass(frozen=True)
class TokenBatch(Batch):
    """Pictures as codes and captions as ids: what the transformers train on."""

    text: Int[Tensor, "batch text"]
    """Caption ids, right-padded with the text tokenizer's pad id (0)."""
    text_mask: Bool[Tensor, "batch text"]
    """True at real caption tokens."""
    codes: Int[Tensor, "batch *code_shape"]
    """Picture codes in the tokenizer's own shape: `grid_h grid_w`, or `grid_h grid_w levels`."""
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
class StepReport:
    """What one optimizer update did."""

    applied: bool
    """False when the loss or gradient was not finite on some rank: nothing was updated, on any rank."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    lr: float
    """Learning rate of the first parameter group at this update."""


@dataclass(frozen=True)
class StepResult:
    """What one training step of a task did: figures already averaged over micro batches, not yet over ranks."""

    metrics: Mapping[str, float]
    reports: Mapping[str, StepReport]
    """By engine name."""
