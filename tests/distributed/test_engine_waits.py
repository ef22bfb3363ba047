"""Waits of DeepSpeed's own that are taken out: on a GPU they would leave it without work."""

from types import SimpleNamespace

import pytest
import torch

from tokscale.dist.testing import run_ranks
from tokscale.engine.backend import load_deepspeed
from tokscale.engine.shards.sliced import SlicedLayout


def waits(comm) -> tuple[list[str], list[str]]:
    """Who waits when a rank alone takes its own shards for whole parameters, and what becomes of these."""
    load_deepspeed(comm)
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import NoGatherCoalescedHandle, NoGatherHandle, ZeroParamStatus

    seen: list[str] = []
    accelerator = get_accelerator()
    accelerator.current_stream = lambda: SimpleNamespace(synchronize=lambda: seen.append("the host waits"))
    accelerator.resolves_data_dependency = lambda: False  # as on CUDA
    params = [
        SimpleNamespace(ds_status=ZeroParamStatus.INFLIGHT, ds_tensor=torch.ones(4), ds_shape=(2, 2), data=None)
        for _ in range(3)
    ]
    NoGatherHandle(params[0]).wait(handle_dependency=True)
    NoGatherCoalescedHandle(params[1:]).wait(handle_dependency=True)
    assert all(param.data.shape == (2, 2) for param in params)
    return seen, [param.ds_status.name for param in params]


def test_the_host_of_a_rank_alone_waits_at_no_module():
    assert run_ranks(waits, 1) == [([], ["AVAILABLE"] * 3)]


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
