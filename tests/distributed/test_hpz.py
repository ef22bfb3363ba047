"""ZeRO-3 across nodes: the second copy inside a node, on four ranks as two nodes, and what travels, by counting."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tokscale.base.batch import LossOutput
from tokscale.base.errors import ConfigError
from tokscale.bench.plan_time import Travel, travel
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.reader import Checkpoint
from tokscale.checkpoint.store import CheckpointStore
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.testing import VOCAB, ToyBatch, snapshot, toy, train

WORLD, NODE, STEPS = 4, 2, 2
LEAN = {"max_live_parameters": 0, "max_reuse_distance": 0, "param_persistence_threshold": 0}


def build(comm: Comm, config: Any, make_model: Any = None, micro_batches: int = 1) -> Any:
    return build_engine(
        "toy",
        make_model or toy(),
        config=config,
        optimizer=AdamWConfig(lr=1e-2, weight_decay=0.1),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=micro_batches,
        micro_batch_size=8 // micro_batches // comm.world,
        total_steps=100,
    )


class Plain(nn.Module):
    """Each parameter is used once, and no size needs padding on four ranks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB + 1, 32)
        self.layers = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)])
        self.head = nn.Linear(32, VOCAB + 1)

    def forward(self, batch: ToyBatch) -> LossOutput:
        loss = functional.cross_entropy(
            self.head(self.layers(self.embed(batch.ids))).flatten(0, 1), batch.ids.flatten()
        )
        return LossOutput(total=loss, parts={"token": loss})

    def train_flops(self) -> float:
        return 1.0

    def anneal(self, step: int) -> None: ...


class Volume(TorchDispatchMode):
    """Elements that travel, by collective and by the ranks that take part."""

    def __init__(self):
        super().__init__()
        self.elements: dict[tuple[str, int], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            out, into = args[0].numel(), args[1].numel()
            key = (name.split("_")[1], max(out, into) // min(out, into))
            self.elements[key] = self.elements.get(key, 0) + max(out, into)
        return func(*args, **(kwargs or {}))


def volumes(comm: Comm, hpz: int | str) -> dict[int, dict[tuple[str, int], float]]:
    """Elements by micro batches, collective and ranks, as multiples of the parameters."""
    found = {}
    for micro_batches in (1, 2):
        config = ZeroConfig(zero_hpz_partition_size=hpz, **LEAN)
        engine = build(comm, config, Plain, micro_batches)
        total = sum(parameter.ds_numel for parameter in engine.model.parameters())
        train(engine, comm, [0], micro_batches=micro_batches)  # the order of gathering is learnt in the first
        with Volume() as volume:
            train(engine, comm, [1], micro_batches=micro_batches)
        found[micro_batches] = {key: count / total for key, count in volume.elements.items()}
    return found


def story(comm: Comm, hpz: int, folder: Path) -> dict[str, Any]:
    """Losses of a run that is saved and taken up in the middle, and what travels."""
    config = ZeroConfig(zero_hpz_partition_size=hpz, ema=(0.9,), sharded_init=True, sub_group_size=500, **LEAN)
    engine = build(comm, config)
    losses = train(engine, comm, range(STEPS))[0]
    store = CheckpointStore(folder, CheckpointConfig(async_save=False), comm)
    store.save(STEPS, {"toy": engine}, {})
    losses += train(engine, comm, range(STEPS, STEPS + 2))[0]
    again = build(comm, config, toy(seed=9))
    train(again, comm, [0])  # second copies of what is about to be replaced stand now
    with store.newest().source("toy") as source:
        again.load(source)
    found: dict[str, Any] = {"straight": losses, "resumed": train(again, comm, range(STEPS, STEPS + 2))[0]}
    found["volumes"] = volumes(comm, hpz)
    if hpz > 1:
        with pytest.raises(ConfigError, match="an earlier engine of this process has 2"):
            build(comm, ZeroConfig(stage=3))
    return found


def read_elsewhere(comm: Comm, folder: Path) -> list[bool]:
    """Whether every other layout takes over a checkpoint that was written with a second copy."""
    expected = Checkpoint(folder).source("toy")
    equal = []
    for config in (ZeroConfig(stage=3), ZeroConfig(stage=2), ZeroConfig(stage=1), ZeroConfig(stage=0), EagerConfig()):
        engine = build(comm, config.model_copy(update={"ema": (0.9,)}), toy(seed=5))
        engine.load(expected)
        held = snapshot(engine, comm).whole()
        equal.append(
            all(
                torch.equal(value.flatten(), expected.read(name, slot, 0, value.numel()))
                for (name, slot), value in held.items()
            )
        )
    return equal


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("hpz")
    found: dict[int, Any] = {
        hpz: run_ranks(story, WORLD, hpz, folder / f"{hpz}", fork=True, imports=("deepspeed",))[0] for hpz in (1, NODE)
    }
    found["folder"] = folder
    return found


def test_losses_are_bit_equal_to_those_of_plain_zero_3(runs):
    straight, resumed = runs[NODE]["straight"], runs[NODE]["resumed"]
    assert straight == runs[1]["straight"] and straight[-1] < straight[0]
    assert resumed == straight[STEPS:] == runs[1]["resumed"]


def test_what_travels_is_what_the_theory_says(runs):
    """Gatherings and reductions of each micro-batch, as `bench plan` counts them."""
    for m, found in runs[1]["volumes"].items():
        assert travel(m, hpz=False) == Travel(across=2 * m, inside=0, reduced=m)
        assert found == pytest.approx({("allgather", WORLD): 2 * m, ("reduce", WORLD): m}, rel=0.01)
    for m, found in runs[NODE]["volumes"].items():
        assert travel(m, hpz=True) == Travel(across=1, inside=2 * m - 1, reduced=m)
        across = {("allgather", WORLD): 1, ("reduce", WORLD): m}
        assert found == pytest.approx({**across, ("allgather", NODE): 2 * m - 1}, rel=0.01)


def test_its_checkpoints_are_read_into_every_other_layout(runs):
    folder = runs["folder"] / f"{NODE}" / f"step_{STEPS:09d}"
    assert all(all(equal) for equal in run_ranks(read_elsewhere, 2, folder, fork=True, imports=("deepspeed",)))
