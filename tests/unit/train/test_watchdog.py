"""A run that stops moving ends with 76, its late rank named and every rank's stacks written."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import toy_run

from tokscale.bench.file_calls import count_file_calls
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.dist.testing import run_ranks
from tokscale.train import watchdog as watchdog_module
from tokscale.train.stragglers import Stragglers, straggler_score
from tokscale.train.watchdog import (
    FOLDER,
    MARKER,
    Heartbeat,
    Watchdog,
    WatchdogConfig,
    describe_stall,
    read_heartbeats,
    stacks_path,
)

ALONE = Comm(ProcessEnv())
QUICK = WatchdogConfig(step_seconds=2, long_seconds=2, heartbeat_seconds=0.1, grace_seconds=60)


def beat(rank: int, phase: str, step: int) -> Heartbeat:
    return Heartbeat(rank, f"n{rank}", 100 + rank, phase, step, 5.0, True)


@pytest.mark.parametrize(
    ("beats", "words"),
    [
        (
            [beat(0, "exchange", 7), beat(1, "data", 7)],
            ["late is rank 1 (n1, process 101), in phase data after step 7"],
        ),
        ([beat(0, "data", 8), beat(1, "save", 8)], ["late is rank 1", "others are in phase data after step 8"]),
        ([beat(0, "data", 8), beat(1, "exchange", 7)], ["late is rank 1"]),
        ([beat(0, "step", 0), beat(1, "first data", 0)], ["late is rank 1", "in phase first data after step 0"]),
        ([beat(0, "step", 7), None, beat(2, "step", 7)], ["no heartbeat of rank 1", "in phase step after step 7"]),
        ([beat(0, "step", 7), beat(1, "step", 7)], ["every rank is in phase step after step 7 for 5 s"]),
        ([None, None], ["no heartbeat of rank 0, 1"]),
    ],
)
def test_who_is_late(beats, words):
    for each in words:
        assert each in describe_stall(beats)


def test_a_moving_run_is_left_alone_and_leaves_nothing_behind(tmp_path, monkeypatch):
    now, looks = [0.0], threading.Semaphore(0)

    def clock() -> float:
        if threading.current_thread().name == "watchdog":
            looks.release()
        return now[0]

    monkeypatch.setattr(watchdog_module, "time", SimpleNamespace(monotonic=clock))
    before = signal.getsignal(signal.SIGUSR2)
    limits = WatchdogConfig(step_seconds=600, long_seconds=600, heartbeat_seconds=0.01)
    with Watchdog(limits, ALONE, tmp_path) as watchdog:
        for step in range(8):
            watchdog.beat("step", step)
            now[0] += 250  # together far beyond the limit; two are not, in case it is just comparing
            while looks.acquire(blocking=False):
                pass
            for _ in range(4):  # it asks for the time at most four times in a look, so it has looked
                assert looks.acquire(timeout=60)
    assert not (tmp_path / FOLDER / MARKER).exists()
    assert stacks_path(tmp_path / "logs", 0).read_text() == "" and signal.getsignal(signal.SIGUSR2) == before


def test_stacks_can_be_asked_for(tmp_path):
    with Watchdog(WatchdogConfig(), ALONE, tmp_path):
        os.kill(os.getpid(), signal.SIGUSR2)
        assert "test_stacks_can_be_asked_for" in stacks_path(tmp_path / "logs", 0).read_text()


def test_switched_off_it_touches_nothing(tmp_path):
    with Watchdog(WatchdogConfig(enabled=False), ALONE, tmp_path) as watchdog:
        watchdog.beat("data", 0)
    assert not list(tmp_path.iterdir())


def hang(comm: Comm, folder) -> None:
    def say(error) -> None:
        (folder / f"told_{comm.rank}").write_text(str(error))

    with Watchdog(QUICK, comm, folder, say) as watchdog:
        watchdog.beat("data", 3)
        if comm.rank == 0:
            watchdog.beat("exchange", 3)
            comm.barrier()
        fetch_for_ever()


def fetch_for_ever() -> None:
    time.sleep(600)


def test_the_late_one_of_two_ranks_is_named_by_both(tmp_path):
    with pytest.raises(RuntimeError):
        run_ranks(hang, 2, tmp_path)
    told = [path.read_text() for path in sorted(tmp_path.glob("told_*"))]
    assert told and all("late is rank 1" in words and "phase data after step 3" in words for words in told)
    assert "fetch_for_ever" in stacks_path(tmp_path / "logs", 1).read_text()
    assert "barrier" in stacks_path(tmp_path / "logs", 0).read_text()


def test_the_process_of_a_stalled_run_ends_with_76(tmp_path):
    program = f"""
import sys; sys.path.insert(0, {str(toy_run.__file__.rpartition("/")[0])!r})
from pathlib import Path
import toy_run
from tokscale.bench.file_calls import count_file_calls
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.train.watchdog import Watchdog, WatchdogConfig
comm, folder = Comm(ProcessEnv()), Path({str(tmp_path)!r})
limits = WatchdogConfig(long_seconds=600, heartbeat_seconds=0.1, grace_seconds=1)
made = toy_run.trainer(comm, folder, pause=600)
with Watchdog(limits, comm, folder) as made_by_stage:
    def beat(phase, step):  # until the first data everything may be slow
        made_by_stage.beat(phase, step)
        if phase == "first data":
            made_by_stage._config = limits.model_copy(update={{"long_seconds": 1}})
    made._beat = beat
    made.run()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 76 and "every rank is in phase first data" in ended.stderr
    assert "next_batch" in stacks_path(tmp_path / "logs", 0).read_text()


def test_the_straggler_is_who_needs_longer_than_the_median():
    assert straggler_score([1.0, 1.0, 1.5, 0.9]) == (1.5, 2)
    assert straggler_score([2.0, 1.0]) == (2.0, 0)
    assert straggler_score([1.0]) == (1.0, 0)


def test_who_is_slow_again_and_again_may_be_left_out():
    slow = Stragglers(Comm(ProcessEnv()))
    for _ in range(2):
        slow.read([1.0, 2.0, 1.0])
    assert slow.slow_rank(1.5) is None  # three readings in a row
    slow.read([1.0, 2.0, 1.0])
    assert slow.slow_rank(1.5) == 1 and slow.slow_rank(2.5) is None
    slow.read([1.0, 1.0, 1.0])
    assert slow.slow_rank(1.5) is None


def beating(comm: Comm, folder) -> tuple[set[str], set[str], set[int]]:
    """What lies in the run folder, what this rank asks of it while it beats, and whose heartbeats are there."""
    limits = WatchdogConfig(heartbeat_seconds=0.02)
    with Watchdog(limits, comm, folder) as watchdog:
        watchdog.beat("step", 3)
        comm.barrier()
        with count_file_calls(folder / FOLDER) as calls:
            beats, deadline = [], time.monotonic() + 60
            while comm.rank == 0 and (len(beats) < 3 or not calls["writes"]):
                beats = [beat for beat in read_heartbeats(folder / FOLDER, 3) if beat]
                assert time.monotonic() < deadline
            comm.barrier()  # they all have beaten meanwhile
        names = {path.name for path in (folder / FOLDER).iterdir() if path.suffix == ".json"}
        comm.barrier()
    return names, set(calls) & {"writes"}, {beat.rank for beat in beats}


def test_a_node_has_one_file_of_heartbeats_and_one_writer(tmp_path):
    main, *others = run_ranks(beating, 3, tmp_path, fork=True)
    assert main[0] == {"node_0000.json"} and main[2] == {0, 1, 2}
    assert main[1] == {"writes"} and all(other[1] == set() for other in others)
