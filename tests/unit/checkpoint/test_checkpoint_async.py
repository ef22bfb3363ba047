"""Saving beside training: what is written is the state at the call, one at a time, and no failure is lost."""

import logging
import threading
import time
from pathlib import Path

import pytest
import torch

from tokscale.base.errors import StorageError
from tokscale.base.state import TensorShard
from tokscale.checkpoint.asyncsave import AsyncSave, HostCopy
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.disk import Disk
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.testing import Flat, alone, tensors


class Gated(Disk):
    """A disk whose writes wait for `gate`, and fail when told to."""

    def __init__(self) -> None:
        self.gate, self.broken = threading.Event(), False

    def write(self, descriptor: int, data: memoryview) -> None:
        assert self.gate.wait(20)
        if self.broken:
            raise OSError(28, "No space left on device")
        super().write(descriptor, data)


def gated(folder) -> tuple[CheckpointStore, Gated]:
    disk = Gated()
    return CheckpointStore(folder, CheckpointConfig(async_save=True), alone(), disk), disk


def saved_once(folder) -> None:
    CheckpointStore(folder, CheckpointConfig(), alone()).save(1, {"model": Flat(tensors(1))}, {})


def test_training_goes_on_while_the_state_of_the_call_is_written(tmp_path):
    saved_once(tmp_path)
    store, disk = gated(tmp_path)
    engine = Flat(tensors(5), updates=5)
    assert store.save(5, {"model": engine}, {"at": 5}) is None
    for _ in range(3):
        engine.step()
        assert store.poll() is None
    assert store.newest().step == 1  # nothing counts before it is committed
    disk.gate.set()
    assert store.wait() == tmp_path / "step_000000005"
    found = store.newest()
    assert found.step == 5
    fresh = Flat(tensors(6))
    fresh.load(found.source("model"))
    assert fresh.updates == 5
    assert all(torch.equal(fresh.local[key], value.flatten()) for key, value in tensors(5).items())


def test_poll_reports_a_committed_save_once(tmp_path):
    saved_once(tmp_path)
    store, disk = gated(tmp_path)
    disk.gate.set()
    store.save(5, {"model": Flat(tensors(5))}, {})
    deadline = time.monotonic() + 120
    while (path := store.poll()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path == tmp_path / "step_000000005" and store.poll() is None and store.wait() is None


def test_a_second_save_waits_for_the_first(tmp_path, monkeypatch):
    saved_once(tmp_path)
    store, disk = gated(tmp_path)
    store.save(5, {"model": Flat(tensors(5))}, {})
    result, waits = AsyncSave.result, []

    def waited_for(save: AsyncSave) -> Path:
        waits.append(save.step)
        disk.gate.set()
        return result(save)

    monkeypatch.setattr(AsyncSave, "result", waited_for)
    store.save(6, {"model": Flat(tensors(6))}, {})
    assert waits == [5]
    assert (tmp_path / "step_000000005" / "manifest.json").exists()
    store.close()
    assert store.newest().step == 6


@pytest.mark.parametrize("surface", ["poll", "wait", "close", "save"])
def test_a_failure_surfaces_at_the_next_occasion(tmp_path, surface):
    saved_once(tmp_path)
    store, disk = gated(tmp_path)
    disk.broken = True
    disk.gate.set()
    store.save(5, {"model": Flat(tensors(5))}, {})
    with pytest.raises(StorageError, match="earlier checkpoints are intact"):
        if surface == "save":
            store.save(6, {"model": Flat(tensors(6))}, {})
        while surface == "poll":
            store.poll()
            time.sleep(0.01)
        getattr(store, surface)()
    assert store.wait() is None  # said once
    assert store.newest().step == 1 and not list(tmp_path.glob(".*"))


def test_leaving_a_store_finishes_the_save(tmp_path):
    saved_once(tmp_path)
    store, disk = gated(tmp_path)
    threading.Timer(0.1, disk.gate.set).start()
    with store:
        store.save(5, {"model": Flat(tensors(5))}, {})
    assert store.newest().step == 5


@pytest.mark.parametrize("broken", [False, True])
def test_a_failure_elsewhere_lets_the_save_finish_and_stays_the_failure(tmp_path, broken, caplog):
    saved_once(tmp_path)
    store, disk = gated(tmp_path)
    disk.broken = broken
    threading.Timer(0.1, disk.gate.set).start()
    with caplog.at_level(logging.ERROR, logger="tokscale.checkpoint"), pytest.raises(ZeroDivisionError), store:
        store.save(5, {"model": Flat(tensors(5))}, {})
        raise ZeroDivisionError
    assert store.newest().step == (1 if broken else 5)
    assert ("step 5, under way, is lost" in caplog.text) == broken


def test_host_copies_reuse_their_memory(tmp_path):
    del tmp_path
    copies, engine = HostCopy(), Flat(tensors(1))
    first = {(s.name, s.slot): s.data.data_ptr() for s in copies.copy("model", engine.shards()) if s.data.numel()}
    engine.step()
    second = copies.copy("model", engine.shards())
    assert {(s.name, s.slot): s.data.data_ptr() for s in second if s.data.numel()} == first
    assert all(torch.equal(shard.data, engine.local[shard.name, shard.slot]) for shard in second)
    assert {shard.data.data_ptr() for shard in second}.isdisjoint(
        v.data_ptr() for v in engine.local.values() if v.numel()
    )


@pytest.mark.gpu
def test_copies_from_the_gpu_are_pinned_and_complete():
    data = torch.arange(1 << 20, device="cuda", dtype=torch.float32)
    (copied,) = HostCopy().copy("model", [TensorShard("a", "weight", (1 << 20,), 0, data)])
    data.zero_()
    assert copied.data.is_pinned() and torch.equal(copied.data, torch.arange(1 << 20, dtype=torch.float32))
