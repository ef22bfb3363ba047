"""What tests of engines need: a small model with every awkward kind of state, its data, and checkpoints in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokscale.base import rng
from tokscale.base.batch import Batch, LossOutput, StepReport
from tokscale.base.errors import CheckpointError
from tokscale.base.protocols import Engine
from tokscale.base.shapes import Int
from tokscale.base.state import TensorShard
from tokscale.dist.comm import Comm

VOCAB = 23


@dataclass(frozen=True)
class ToyBatch(Batch):
    """Random ids; the task is to name `(5 * id + 3) % VOCAB` at each place."""

    ids: Int[Tensor, "batch seq"]


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.3)


class ToyModel(nn.Module):
    """Tied embedding, blocks used more than once, a frozen layer, a persistent and a hidden buffer, odd sizes."""

    scale: Tensor
    shift: Tensor

    def __init__(self, dim: int = 15, blocks: int = 2, uses: Sequence[int] = (0, 1, 0)):
        super().__init__()
        self.embed = _Embedding(VOCAB, dim)
        self.frozen = nn.Linear(dim, dim).requires_grad_(False)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in uses)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(blocks)
        )
        self.head = nn.Linear(dim, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((3,), 0.5))
        self.register_buffer("shift", torch.zeros((), dtype=torch.bool), persistent=False)
        self.uses = list(uses)

    def forward(self, batch: ToyBatch) -> LossOutput:
        """Cross-entropy of the asked-for ids."""
        x = self.embed(batch.ids)
        x = x + self.frozen(x) * self.scale[1] + self.shift
        for norm, use in zip(self.norms, self.uses, strict=True):
            x = x + self.blocks[use](norm(x))
        loss = functional.cross_entropy(self.head(x).flatten(0, 1).float(), ((5 * batch.ids + 3) % VOCAB).flatten())
        return LossOutput(total=loss, parts={"token": loss})

    def train_flops(self) -> float:
        """Six per parameter: enough for a toy."""
        return 6.0 * sum(parameter.numel() for parameter in self.parameters())

    def anneal(self, step: int) -> None:
        """Nothing is scheduled."""


def toy(seed: int = 0, **options: Any) -> Callable[[], ToyModel]:
    """A `make_model` for `build_engine`."""

    def make() -> ToyModel:
        with rng.scope(seed, "init"):
            return ToyModel(**options)

    return make


def toy_batch(step: int, size: int, *, seq: int = 5, seed: int = 0) -> ToyBatch:
    """Global batch number `step`: the same whatever the ranks."""
    ids = torch.randint(VOCAB, (size, seq), generator=rng.generator(seed, "toy", step))
    return ToyBatch(positions=torch.arange(step * size, (step + 1) * size), ids=ids)


def train(
    engine: Engine, comm: Comm, steps: Sequence[int], *, batch: int = 8, micro_batches: int = 1
) -> tuple[list[float], list[StepReport]]:
    """Train on the toy task; the global mean loss of each step, and the reports."""
    losses, reports = [], []
    for step in steps:
        local = batch // comm.world
        everything = toy_batch(step, batch)
        rows = slice(comm.rank * local, (comm.rank + 1) * local)
        mine = ToyBatch(positions=everything.positions[rows], ids=everything.ids[rows]).to(engine.device)
        total = 0.0
        for micro in mine.split(micro_batches):
            loss = engine(micro).total
            total += loss.item() / micro_batches
            engine.backward(loss)
        reports.append(engine.step(step))
        losses.append(comm.mean({"loss": total})["loss"])
    return losses, reports


class MemorySource:
    """A `ShardSource` over shards gathered from all ranks; counts what is read.

    Raises:
        CheckpointError: When the shards do not tile each tensor exactly once.
    """

    def __init__(self, shards: Sequence[TensorShard], scalars: Mapping[str, Any]):
        self.scalars = scalars
        self.elements_read = 0
        self._tensors: dict[tuple[str, str], Tensor] = {}
        self._shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        covered: dict[tuple[str, str], Tensor] = {}
        for shard in shards:
            key = (shard.name, shard.slot)
            if key not in self._tensors:
                count = torch.Size(shard.shape).numel()
                self._tensors[key] = torch.empty(count, dtype=shard.data.dtype)
                self._shapes[key] = shard.shape
                covered[key] = torch.zeros(count, dtype=torch.int32)
            place = slice(shard.start, shard.start + shard.data.numel())
            self._tensors[key][place] = shard.data.cpu()
            covered[key][place] += 1
        for key, count in covered.items():
            if not bool((count == 1).all()):
                raise CheckpointError(f"{key}: elements are stored {count.min()} to {count.max()} times, not once")

    def names(self) -> tuple[str, ...]:
        """Stored tensor names."""
        return tuple(dict.fromkeys(name for name, _ in self._tensors))

    def slots(self, name: str) -> tuple[str, ...]:
        """Slots stored under a name."""
        return tuple(slot for known, slot in self._tensors if known == name)

    def shape(self, name: str, slot: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return self._shapes[name, slot]

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)`, counted."""
        if (name, slot) not in self._tensors:
            raise CheckpointError(f"{name} ({slot}) is not stored")
        self.elements_read += stop - start
        return self._tensors[name, slot][start:stop].clone()

    def whole(self) -> dict[tuple[str, str], Tensor]:
        """Every tensor, for comparisons."""
        return {key: value.view(self._shapes[key]) for key, value in self._tensors.items()}


def snapshot(engine: Engine, comm: Comm) -> MemorySource:
    """All ranks' shards of an engine as a checkpoint. Collective."""
    own = [TensorShard(s.name, s.slot, s.shape, s.start, s.data.detach().clone().cpu()) for s in engine.shards()]
    return MemorySource([s for shards in comm.gather_objects(own) for s in shards], dict(engine.scalars()))
