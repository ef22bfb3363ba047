"""What tests of checkpoints need: an engine that only holds tensors, and a file layer that fails where told to."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tokscale.base.state import ShardSource, TensorShard
from tokscale.checkpoint.disk import Disk
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv

CALLS = (
    "make_folder",
    "create",
    "write",
    "sync",
    "close",
    "rename",
    "replace",
    "sync_folder",
    "remove_file",
    "remove_folder",
)


class FaultyDisk(Disk):
    """The file layer with a fault at its `at`-th call, counted from 0 over all kinds of call.

    `kill-before` and `kill-after` end the process by SIGKILL around the call (a write is then half done), `full` lets
    every creation and write from there on fail for want of space, `refused` lets that one call fail.
    """

    def __init__(self, fault: str = "none", at: int = -1):
        self.fault, self.at, self.count = fault, at, 0


def _faulty(name: str) -> Callable[..., Any]:
    real = getattr(Disk, name)

    def call(self: FaultyDisk, *arguments: Any) -> Any:
        here, self.count = self.count == self.at, self.count + 1
        if here and self.fault == "kill-before":
            os.kill(os.getpid(), signal.SIGKILL)
        if here and self.fault == "refused":
            raise OSError(5, "Input/output error", str(arguments[0]))
        if self.fault == "full" and self.count > self.at and name in ("make_folder", "create", "write"):
            raise OSError(28, "No space left on device")
        if here and self.fault == "kill-after":
            real(self, *((arguments[0], arguments[1][: len(arguments[1]) // 2]) if name == "write" else arguments))
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *arguments)

    return call


for _name in CALLS:
    setattr(FaultyDisk, _name, _faulty(_name))


def alone() -> Comm:
    """A job of one."""
    return Comm(ProcessEnv())


class Flat:
    """Tensors whose every range `rank` of `world` owns, as ZeRO-3 cuts them: ceil(numel / world) elements a rank."""

    name = "model"

    def __init__(self, tensors: Mapping[tuple[str, str], Tensor], rank: int = 0, world: int = 1, updates: int = 0):
        self.shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        self.rank, self.world, self.updates = rank, world, updates
        self.local = {key: value.flatten()[self.bounds(key)].clone() for key, value in tensors.items()}

    def bounds(self, key: tuple[str, str]) -> slice:
        """This rank's elements of a tensor."""
        numel = torch.Size(self.shapes[key]).numel()
        size = -(-numel // self.world)
        return slice(min(self.rank * size, numel), min((self.rank + 1) * size, numel))

    def shards(self) -> Iterator[TensorShard]:
        """This rank's ranges, also the empty ones."""
        for (name, slot), data in self.local.items():
            yield TensorShard(name, slot, self.shapes[name, slot], self.bounds((name, slot)).start, data)

    def scalars(self) -> dict[str, Any]:
        """The update counter."""
        return {"updates": self.updates}

    def load(self, source: ShardSource) -> None:
        """Take over a checkpoint of any layout."""
        for (name, slot), data in self.local.items():
            bounds = self.bounds((name, slot))
            data.copy_(source.read(name, slot, bounds.start, bounds.stop))
        self.updates = source.scalars["updates"]

    def step(self) -> None:
        """A change that depends on every earlier one, so that two equal states had equal histories."""
        self.updates += 1
        for data in self.local.values():
            if data.is_floating_point():
                data.mul_(1.25).add_(self.updates)


def tensors(seed: int = 0, *, rows: int = 7) -> dict[tuple[str, str], Tensor]:
    """Two parameters with moments and an average, a frozen one, buffers of odd types and an empty tensor."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (rows, 5), "head.bias": (3,)}
    found = {
        (name, slot): torch.randn(shape, generator=draw)
        for name, shape in shapes.items()
        for slot in ("weight", "exp_avg", "exp_avg_sq", "ema/0.999")
    }
    found["norm.scale", "frozen"] = torch.randn(4, generator=draw).to(torch.bfloat16)
    found["counts", "buffer"] = torch.randint(0, 9, (), generator=draw)
    found["mask", "buffer"] = torch.randn(3, 3, generator=draw) > 0
    found["nothing", "buffer"] = torch.empty(0, 4)
    return found
