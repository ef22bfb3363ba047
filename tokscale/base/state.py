"""Persistent tensors as flat ranges: the one language in which engines and checkpoints talk.

A tensor is known by `(name, slot)`: the parameter's or buffer's own name, and what of it this is. Wherever an engine
keeps it (whole, in flat ZeRO partitions, in per-parameter ZeRO-3 slices), each rank holds contiguous ranges of its
row-major elements. Saving writes ranges, loading reads ranges, so every layout loads into every other.

Slots: `weight` (fp32 master), `buffer`, `frozen`, the optimizer's own state names (`exp_avg`, `exp_avg_sq`, ...),
and `ema/<decay>` for averages.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorShard:
    """Elements `[start, start + data.numel())` of one persistent tensor, flattened row-major."""

    name: str
    slot: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    data: Tensor
    """One-dimensional, in the dtype it is stored in. May alias live training state: copy before the next step."""


@runtime_checkable
class Persistent(Protocol):
    """What a checkpoint saves: an engine, as far as its state goes."""

    def shards(self) -> Iterator[TensorShard]:
        """This rank's share of every persistent tensor. The shares of all ranks tile each tensor exactly once."""
        ...

    def scalars(self) -> Mapping[str, Any]:
        """JSON-ready state that is equal on all ranks."""
        ...


@runtime_checkable
class ShardSource(Protocol):
    """A finished checkpoint, as an engine reads it."""

    scalars: Mapping[str, Any]
    """What the engine's `scalars()` returned when it was saved."""

    def slots(self, name: str) -> tuple[str, ...]:
        """Which slots are stored for a tensor; empty when the name is unknown."""
        ...

    def names(self) -> tuple[str, ...]:
        """All stored tensor names, in saving order."""
        ...

    def shape(self, name: str, slot: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        ...

    def read(self, name: str, slot: str, start: int, stop: int) -> torch.Tensor:
        """Elements `[start, stop)`, one-dimensional, on the CPU. Reads only these bytes.

        Raises:
            CheckpointError: When the tensor is not stored or its file is damaged.
        """
        ...
