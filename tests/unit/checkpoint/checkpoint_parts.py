"""A small engine of real tensors, for tests that are about files, not about training."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tokscale.base.state import ShardSource, TensorShard
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv


def alone() -> Comm:
    return Comm(ProcessEnv())


class Flat:
    """Tensors whose every range `rank` of `world` owns, as ZeRO-3 cuts them: ceil(numel / world) elements a rank."""

    name = "model"

    def __init__(self, tensors: Mapping[tuple[str, str], Tensor], rank: int = 0, world: int = 1, updates: int = 0):
        self.shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        self.rank, self.world, self.updates = rank, world, updates
        self.local = {key: value.flatten()[self.bounds(key)].clone() for key, value in tensors.items()}

    def bounds(self, key: tuple[str, str]) -> slice:
        numel = torch.Size(self.shapes[key]).numel()
        size = -(-numel // self.world)
        return slice(min(self.rank * size, numel), min((self.rank + 1) * size, numel))

    def shards(self) -> Iterator[TensorShard]:
        for (name, slot), data in self.local.items():
            yield TensorShard(name, slot, self.shapes[name, slot], self.bounds((name, slot)).start, data)

    def scalars(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load(self, source: ShardSource) -> None:
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
