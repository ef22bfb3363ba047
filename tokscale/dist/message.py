"""What the ranks tell each other in a step: scalars, packed and summed by one reduction on the device's own backend.

Nothing waits: the sums are tensors that later kernels may read at once, and their way to the host has begun. Whoever
needs them as numbers asks later, ideally when the device has long gone on to something else.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
import torch.distributed as torch_dist
from torch import Tensor

from tokscale.dist.comm import Comm

Scalar = Tensor | float
Value = Scalar | Sequence[float]
"""What a message can carry under a name: a scalar of device or host, or several numbers of the host."""


class Message:
    """Named values of this rank on their way to their sums over all ranks."""

    def __init__(self, comm: Comm, values: Mapping[str, Value]):
        """Pack, reduce, and begin the copy to the host. Collective: every rank sends the same names and kinds.

        Args:
            comm: The job.
            values: By name; float64 on the way.
        """
        self._several = {name: len(value) for name, value in values.items() if isinstance(value, Sequence)}
        self._names, packed = _pack(values, comm.device)
        if comm.world > 1 and packed.numel():
            torch_dist.all_reduce(packed)
        self._packed = packed
        self._ready: torch.cuda.Event | None = None
        self._host = packed
        if packed.is_cuda:
            self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(packed.device))

    def total(self, name: str) -> Tensor:
        """The sum of a scalar over ranks, on the device; float64. Waits for nothing."""
        return self._packed[self._names[name]]

    @cached_property
    def totals(self) -> dict[str, float]:
        """The sum of each scalar over ranks. The first look waits for the device to get there."""
        numbers = self._numbers
        return {name: numbers[at] for name, at in self._names.items() if name not in self._several}

    def several(self, name: str) -> list[float]:
        """The sums of what was sent as several numbers. Waits likewise."""
        at = self._names[name]
        return self._numbers[at : at + self._several[name]]

    @cached_property
    def _numbers(self) -> list[float]:
        if self._ready is not None:
            self._ready.synchronize()
        return self._host.tolist()


def _pack(values: Mapping[str, Value], device: torch.device) -> tuple[dict[str, int], Tensor]:
    """The values one after another, those of the device first, and where each of them begins.

    Places follow from names and order alone: a rank whose value has another type must not shift what others add to.
    """
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    names = {name: at for at, name in enumerate(tensors)}
    numbers: list[float] = []
    for name, value in values.items():
        if not isinstance(value, Tensor):
            names[name] = len(tensors) + len(numbers)
            numbers.extend(value if isinstance(value, Sequence) else [value])
    parts = []
    if tensors:
        moved = [value.detach().to(device, torch.float64, non_blocking=True) for value in tensors.values()]
        parts.append(torch.stack([value.reshape(()) for value in moved]))
    if numbers:
        pinned = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
        parts.append(pinned.to(device, non_blocking=True))
    return names, torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=device)
