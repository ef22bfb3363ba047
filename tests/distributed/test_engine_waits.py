"""Waits of DeepSpeed's own that are taken out: on a GPU they would leave it without work."""

from types import SimpleNamespace

import pytest
import torch

from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.shards.sliced import SlicedLayout
from tokscale.engine.testing import toy, train


def waits(comm) -> tuple[list[float], list[str]]:
    """Losses of a rank alone under ZeRO-3, and who waited for the stream that it computes on."""
    engine = build_engine(
        "toy",
        toy(),
        config=ZeroConfig(stage=3, param_persistence_threshold=0),
        optimizer=AdamWConfig(lr=1e-2),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=8,
        total_steps=10,
    )
    from deepspeed.accelerator import get_accelerator

    seen: list[str] = []
    accelerator = get_accelerator()
    accelerator.current_stream = lambda: SimpleNamespace(
        synchronize=lambda: seen.append("wait"), wait_stream=lambda stream: None
    )
    accelerator.resolves_data_dependency = lambda: False  # as on CUDA
    return train(engine, comm, range(10))[0], seen


def test_the_host_of_a_rank_alone_waits_at_no_module():
    ((losses, seen),) = run_ranks(waits, 1)
    assert losses[-1] < 0.9 * losses[0] and not seen


def test_kernels_and_not_the_host_wait_for_the_reduction(monkeypatch):
    seen: list[str] = []
    device = torch.device("cuda", 0)
    stream = SimpleNamespace(device=device, synchronize=lambda: pytest.fail("the host waited"))
    current = SimpleNamespace(wait_stream=lambda other: seen.append("waits" if other is stream else "for another"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda asked: current if asked == device else None)
    zero = SimpleNamespace(optimizer=None, step=None, reduce_and_partition_stream=stream)
    SlicedLayout(SimpleNamespace(module=None, optimizer=zero, device=device))
    zero.reduce_and_partition_stream.synchronize()
    assert seen == ["waits"]
