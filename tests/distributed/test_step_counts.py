"""A training step never waits: looks from the host, messages and passes over the gradient, counted in real steps.

Stored values change only with a reason. On the CPU an operation counts as a look when it could not end on a GPU before
the host has seen a value of the device.
"""

import collections
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokscale.base import rng
from tokscale.base.batch import ImageBatch, TokenBatch
from tokscale.base.config import decode
from tokscale.base.protocols import TrainTask
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.store import CheckpointStore
from tokscale.dist.comm import Comm
from tokscale.dist.message import Message
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import (
    AdafactorConfig,
    AdamWConfig,
    EagerConfig,
    LionConfig,
    MuonConfig,
    ScheduleConfig,
    ZeroConfig,
)
from tokscale.models.dalle import DALLEConfig
from tokscale.models.registry import build_model
from tokscale.stages.tokenizer_training import DISCRIMINATOR, tokenizer_task
from tokscale.tokenizers.vqgan.config import VQGANConfig
from tokscale.train.loop import LoopConfig, Trainer
from tokscale.train.task import SingleModelTask

ENGINES = {"eager": EagerConfig()} | {
    f"zero{stage}": ZeroConfig(stage=stage, param_persistence_threshold=0) for stage in range(4)
}
OPTIMIZERS = {"adamw": AdamWConfig(), "lion": LionConfig(), "adafactor": AdafactorConfig(min_factor=8)}
OPTIMIZERS |= {"muon": MuonConfig()}
CASES = [(engine, "adamw") for engine in ENGINES] + [("zero3", "lion"), ("zero2", "adafactor"), ("zero3", "muon")]
STEPS = 6
LOOKS = {"_local_scalar_dense", "nonzero", "bincount", "_unique2", "masked_select", "is_nonzero", "equal"}
VIEWS = {"view", "slice", "detach", "alias", "as_strided", "unbind", "split", "select", "t", "empty_like", "reshape"}

REDUCTIONS = {"eager": 1, "zero0": 1, "zero1": 1, "zero2": 1, "zero3": 0}
"""All-reduces of gradients in a step: one bucket."""
OF_OPTIMIZERS = {"adamw": 0, "lion": 0}
"""Their own, known for these; a factored or orthogonalising one completes its statistics."""
SWEEPS = {"eager": 5.0, "zero0": 2.0, "zero1": 2.87, "zero2": 2.87, "zero3": 3.0}
"""Norm and update everywhere. Beside them stages 1 and 2 join the pieces of the shard (less than the shard, which is
padded), stage 3 clears it; eager clips in a pass of its own, and packs and unpacks its exchange between ranks."""

VQGAN = decode(
    VQGANConfig,
    {
        "image_size": 16,
        "network": {"kind": "resnet", "dim": 8, "layers": 2},
        "quantizer": {"kind": "vq", "num_tokens": 16, "dim": 4, "decay": 0.9},
        "adversarial": {"dim": 8, "layers": 2, "weight": 0.2, "start_step": 0},
    },
)
PAIRS = {"eager": 8, "zero3": 7}
"""All-reduces of a step of generator and discriminator: a message and a bucket of gradients each (ZeRO-3 reduces those
of the generator by itself), the codebook's counts and sums, and the two norms that weigh the discriminator."""
PAIR_SWEEPS = {"eager": {"tokenizer": 5.0, "discriminator": 5.0}, "zero3": {"tokenizer": 3.0, "discriminator": 3.0}}


class Events(TorchDispatchMode):
    """Notes looks and collectives in order, and elements of the gradient that operations touch."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []
        self.watched: set[int] = set()
        self.touched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name, *_ = str(func).split(".")
        masked = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in LOOKS or masked:
            self.seen.append(f"look: {name}")
        if space in ("c10d", "_c10d_functional") and name != "barrier":
            self.seen.append(name)
        if self.watched and name not in VIEWS:
            tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            mine = [t for t in tensors.values() if t.untyped_storage().data_ptr() in self.watched]
            self.touched += sum(tensor.numel() for tensor in mine)
        return func(*args, **(kwargs or {}))


CURRENT: list[Events] = []


class Batches:
    def __init__(self, comm: Comm):
        self._comm, self._at = comm, 0

    def next_batch(self) -> TokenBatch:
        self._at += 1
        draw = rng.generator(0, "counts", self._at, self._comm.rank)
        text = torch.randint(1, 100, (2, 8), generator=draw)
        codes = torch.randint(0, 32, (2, 4, 4), generator=draw)
        return TokenBatch(positions=torch.arange(2), text=text, text_mask=text > 0, codes=codes)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self._at}

    def load_state_dict(self, state) -> None:
        self._at = state["at"]


class Images(Batches):
    def next_batch(self) -> ImageBatch:
        self._at += 1
        draw = rng.generator(0, "counts", self._at, self._comm.rank)
        return ImageBatch(torch.arange(2), torch.randint(0, 256, (2, 3, 16, 16), generator=draw, dtype=torch.uint8))


def built(comm: Comm, engine: str, optimizer: str, name: str, make: Callable[[], nn.Module]) -> Any:
    config = ENGINES[engine]
    return build_engine(
        name,
        make,
        config=config.with_whole_weights() if name == DISCRIMINATOR else config,
        optimizer=OPTIMIZERS[optimizer],
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=2,
        total_steps=STEPS,
    )


def watched(engine: Any, events: Events, sweeps: list[float]) -> None:
    """Let an engine say when it runs forward, and how often its step passes over its gradient."""
    plain_forward, plain_step, plain_moves = engine._forward, engine.step, engine.optimizer.step

    def forward(batch: Any) -> Any:
        output = plain_forward(batch)
        events.seen.append("forward")
        return output

    def step(number: int) -> Any:
        own = hasattr(engine, "_layout")
        gradients = engine._layout.gradients() if own else [p.grad for p in engine.model.parameters()]
        total = sum(gradient.numel() for gradient in gradients)
        events.watched = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        before = events.touched
        report = plain_step(number)
        sweeps.append((events.touched - before) / total)
        events.watched = set()
        return report

    def moves(closure: None = None) -> None:
        grads = [p.grad for group in engine.optimizer.param_groups for p in group["params"] if p.grad is not None]
        events.watched |= {grad.untyped_storage().data_ptr() for grad in grads}
        plain_moves()

    engine._forward, engine.step, engine.optimizer.step = forward, step, moves


def counted(comm: Comm, engine: str, optimizer: str) -> dict[str, Any]:
    sizes = SimpleNamespace(num_tokens=32, code_shape=(4, 4), image_size=16, channels=3), SimpleNamespace(num_tokens=99)
    model = DALLEConfig(dim=32, depth=2, heads=2, dim_head=16, text_seq_len=8).fitted(*sizes)
    task = SingleModelTask(built(comm, engine, optimizer, "model", lambda: build_model(model)))
    return counted_task(comm, task, Batches(comm))


def counted_pair(comm: Comm, engine: str) -> dict[str, Any]:
    """Of a VQGAN and its discriminator."""
    task = tokenizer_task(VQGAN, lambda name, make: built(comm, engine, "adamw", name, make), comm, 1)
    return counted_task(comm, task, Images(comm))


def counted_task(comm: Comm, task: TrainTask, batches: Any) -> dict[str, Any]:
    events, sweeps = Events(), {name: [] for name in task.engines}
    for name, engine in task.engines.items():
        watched(engine, events, sweeps[name])
    CURRENT[:] = [events]
    with tempfile.TemporaryDirectory() as own:
        folder = Path(comm.broadcast_object(own))
        with events:
            Trainer(
                task,
                batches,
                config=LoopConfig(total_steps=STEPS, log_every=2),
                store=CheckpointStore(folder / "checkpoints", CheckpointConfig(every_steps=100), comm),
                comm=comm,
                run_dir=folder,
            ).run()
        comm.barrier()
    count = len(task.engines)
    places = [at for at, event in enumerate(events.seen) if event == "forward"]
    # Of steps 3 and 4, with the reports of steps 2 and 3 in them.
    steady = events.seen[places[2 * count] : places[4 * count]]
    return {"steady": steady, "sweeps": {name: round(found[3], 2) for name, found in sweeps.items()}}


def all_cases(comm: Comm) -> list[dict[str, Any]]:
    plain = Message._numbers.func  # type: ignore[attr-defined]

    def read(message: Message) -> list[float]:  # a list of a tensor's numbers is made without a dispatcher
        if "_read" not in message.__dict__:
            CURRENT[0].seen.append("read")
            message.__dict__["_read"] = plain(message)
        return message.__dict__["_read"]

    Message._numbers = property(read)  # type: ignore[assignment]  # of this process alone
    return [counted(comm, *case) for case in CASES] + [counted_pair(comm, engine) for engine in PAIRS]


@pytest.fixture(scope="module")
def counts() -> dict[tuple[str, str], dict[str, Any]]:
    return dict(zip([*CASES, *((engine, "pair") for engine in PAIRS)], run_ranks(all_cases, 2)[0], strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_nothing_is_read_before_the_next_forward_pass_is_queued(counts, case):
    steady = counts[case]["steady"]
    assert not [event for event in steady if event.startswith("look")]
    # Per step: its forward pass is queued, and then the message of the step before it is read, once.
    order = [event for event in steady if event in ("forward", "read")]
    assert order == ["forward", "read", "forward", "read"]


@pytest.mark.parametrize("case", [case for case in CASES if case[1] in OF_OPTIMIZERS], ids="-".join)
def test_one_message_a_step_beside_the_engines_own_traffic(counts, case):
    found = collections.Counter(event for event in counts[case]["steady"] if "reduce" in event and "_" in event)
    engine, optimizer = case
    assert found["allreduce_"] == 2 * (REDUCTIONS[engine] + OF_OPTIMIZERS[optimizer] + 1), found


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradient_shard_is_passed_over_at_most_three_times(counts, engine):
    found = counts[engine, "adamw"]["sweeps"]["model"]
    assert found == pytest.approx(SWEEPS[engine], abs=0.05)
    assert found <= 3 + 2 * (engine == "eager")


@pytest.mark.parametrize("engine", PAIRS)
def test_a_task_of_two_engines_waits_no_more_than_one(counts, engine):
    found = counts[engine, "pair"]
    steady = found["steady"]
    assert not [event for event in steady if event.startswith("look")]
    # Both are queued before what the step before has said is read: one message of each.
    assert [event for event in steady if event in ("forward", "read")] == ["forward", "forward", "read", "read"] * 2
    assert collections.Counter(event for event in steady if event == "allreduce_")["allreduce_"] == 2 * PAIRS[engine]
    assert found["sweeps"] == pytest.approx(PAIR_SWEEPS[engine], abs=0.05)
