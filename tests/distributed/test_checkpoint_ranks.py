"""Several ranks, one checkpoint: committed by all or by none, read once in total, and one failure is everybody's."""

import shutil
import time
from pathlib import Path

import pytest
import torch

from tokscale.base.errors import StorageError
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.status import describe
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.testing import FaultyDisk, Flat, tensors
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks


def store(folder: Path, comm: Comm, disk: FaultyDisk | None = None, **config) -> CheckpointStore:
    return CheckpointStore(folder, CheckpointConfig(**config), comm, disk)


def engine(comm: Comm, seed: int) -> Flat:
    return Flat(tensors(seed, rows=40), comm.rank, comm.world, updates=seed)


def failure(action) -> str:
    try:
        action()
    except StorageError as error:
        return str(error)
    return "no failure"


def poll_until_done(target: CheckpointStore) -> None:
    while target.poll() is None:
        time.sleep(0.01)


def story(comm: Comm, folder: Path) -> dict:
    """Everything that two ranks do to one folder; what each of them saw."""
    seen = {}
    plain, beside = store(folder, comm), store(folder, comm, async_save=True)
    seen["nothing yet"] = plain.newest() is None
    seen["first"] = plain.save(1, {"model": engine(comm, 1)}, {"at": 1})
    beside.save(2, {"model": engine(comm, 2)}, {"at": 2})
    poll_until_done(beside)

    fresh, found = engine(comm, 9), beside.newest()
    with found.source("model") as source:
        fresh.load(source)
        seen["read"] = source.bytes_read
    expected = engine(comm, 2)
    seen["equal"] = all(torch.equal(fresh.local[key], value) for key, value in expected.local.items())
    seen["resumed"] = (found.step, found.state, fresh.updates, found.manifest.world)
    seen["stored"] = found.manifest.engines["model"].bytes

    # The last rank's disk is full: nobody has saved, and both say so.
    full = FaultyDisk("full", 1) if comm.rank == 1 else FaultyDisk()
    seen["full"] = failure(lambda: store(folder, comm, full).save(3, {"model": engine(comm, 3)}, {}))
    broken = store(folder, comm, FaultyDisk("full", 1) if comm.rank == 1 else FaultyDisk(), async_save=True)
    broken.save(3, {"model": engine(comm, 3)}, {})
    seen["full beside"] = failure(lambda: poll_until_done(broken))
    seen["kept"] = plain.newest().step
    comm.barrier()
    seen["hidden"] = [path.name for path in folder.glob(".*")]

    # Damage in either rank's file, found by whichever rank looks, is a verdict of all.
    plain.save(4, {"model": engine(comm, 4)}, {})
    full_look = store(folder, comm, verify="full")
    for rank in range(2):
        comm.barrier()
        if comm.is_main:
            path = folder / "step_000000004" / f"model.rank_0000{rank}.safetensors"
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        comm.barrier()
        seen[f"damaged {rank}"] = (plain.newest().step, full_look.newest().step)
        comm.barrier()
        if comm.is_main:
            path.write_bytes(data)
    return seen


def test_saving_is_collective_and_two_ranks_commit_read_and_fail_together(tmp_path):
    first, second = run_ranks(story, 2, tmp_path / "checkpoints")
    for seen in (first, second):
        assert seen["nothing yet"] and seen["first"] == tmp_path / "checkpoints" / "step_000000001"
        assert seen["equal"] and seen["resumed"] == (2, {"at": 2}, 2, 2)
        assert seen["kept"] == 2 and seen["hidden"] == []
        assert seen["damaged 0"] == seen["damaged 1"] == (4, 2)
        assert "No space left on device" in seen["full"] and "No space left on device" in seen["full beside"]
    assert "failed on rank 1" in first["full"] and "failed on rank 1" not in second["full"]
    assert first["read"] + second["read"] == first["stored"], "every byte is read once, over all ranks"
    assert [info.world for info in describe(tmp_path / "checkpoints")] == [2, 2, 2]


def save_and_die(comm: Comm, folder: Path, at: int) -> None:
    disk = FaultyDisk("kill-before", at) if comm.rank == 1 else FaultyDisk()
    store(folder, comm, disk, async_save=at % 2 == 1).save(2, {"model": engine(comm, 2)}, {})
    comm.barrier()


@pytest.mark.parametrize("at", [1, 2])
def test_a_killed_rank_leaves_the_earlier_checkpoint(tmp_path, at):
    target = tmp_path / "checkpoints"
    run_ranks(save_once, 1, target)
    before = (target / "step_000000001" / "manifest.json").read_bytes()
    with pytest.raises(RuntimeError, match="rank 1 of 2 failed"):
        run_ranks(save_and_die, 2, target, at)
    assert [info.step for info in describe(target, verify="full")] == [1]
    assert (target / "step_000000001" / "manifest.json").read_bytes() == before


def save_once(comm: Comm, folder: Path) -> None:
    store(folder, comm).save(1, {"model": engine(comm, 1)}, {})


def separate_disks(comm: Comm, folder: Path) -> str:
    """Each rank has a folder of its own, as on machines without a shared file system."""
    from tokscale.checkpoint import commit

    commit._VISIBLE_SECONDS = 0.2
    return failure(lambda: store(folder / str(comm.rank), comm).save(1, {"model": engine(comm, 1)}, {}))


def test_folders_that_ranks_do_not_share_are_found_out(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    messages = run_ranks(separate_disks, 2, tmp_path)
    assert all("checkpoints need a folder that all nodes share" in message for message in messages)
    assert not list(tmp_path.glob("*/step_*"))
    shutil.rmtree(tmp_path)
