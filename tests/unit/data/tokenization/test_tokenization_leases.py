"""Leases: one worker at a time, and a dead one's work is taken over, however it died."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from tokscale.base.errors import StorageError
from tokscale.data.tokenization.leases import Attempts, Leases, WorkerId


def pretend(folder, name: str, *, machine: str, age: float = 0.0, pid: int = 1, started: str = "1") -> str:
    """A worker elsewhere, whose last heartbeat is `age` seconds old."""
    worker = WorkerId(name, "elsewhere", machine, pid, started)
    path = folder / "workers" / f"{name}.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(asdict(worker)))
    os.utime(path, (time.time() - age, time.time() - age))
    return name


def lease(folder, unit: int, owner: str) -> None:
    (folder / "leases").mkdir(exist_ok=True)
    (folder / "leases" / f"{unit:06d}").write_text(owner)


def test_a_unit_has_one_worker(tmp_path):
    with Leases(tmp_path, 60) as first, Leases(tmp_path, 60) as second:
        assert first.claim(3) == "new" and second.claim(3) is None and second.claim(4) == "new"
        assert first.active() == {3: first.worker.name, 4: second.worker.name}
        second.release(3)  # not its own: nothing happens
        assert second.claim(3) is None
        first.release(3)
        assert first.owner(3) is None and first.active() == {4: second.worker.name}
        assert second.claim(3) == "new"
    assert not list((tmp_path / "workers").iterdir())


def test_of_many_workers_one_wins(tmp_path):
    workers = [Leases(tmp_path, 60) for _ in range(8)]
    for worker in workers:
        worker.__enter__()
    start = threading.Barrier(8)
    won: list[tuple[int, str]] = []

    def claim(worker: Leases) -> None:
        for unit in range(50):
            start.wait()
            if (how := worker.claim(unit)) is not None:
                won.append((unit, how))

    for unit in range(50):
        lease(tmp_path, unit, pretend(tmp_path, f"dead-{unit}", machine=workers[0].worker.machine, pid=2**22 + 1))
    threads = [threading.Thread(target=claim, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for worker in workers:
        worker.__exit__()
    assert won == [(unit, "taken over") for unit in range(50)]


@pytest.mark.parametrize("given_back", [False, True])
def test_a_worker_that_acts_late_takes_nothing_from_one_that_came_between(tmp_path, monkeypatch, given_back):
    with Leases(tmp_path, 60) as first, Leases(tmp_path, 60) as second, Leases(tmp_path, 60) as late:
        lease(tmp_path, 0, "dead")

        def others_act_meanwhile(worker: str) -> bool:
            assert worker == "dead" and first.claim(0) == "taken over"
            if given_back:
                first.release(0)
                assert first.owner(0) is None and second.claim(0) == "new"
            return False

        monkeypatch.setattr(late, "alive", others_act_meanwhile)
        assert late.claim(0) is None
        has = second if given_back else first
        assert has.owner(0) == has.worker.name and has.active() == {0: has.worker.name}
        has.release(0)
        assert has.owner(0) is None and has.active() == {}
        has.clear()
        assert not list((tmp_path / "leases").iterdir())


def test_a_worker_that_gives_back_and_ends_while_another_claims_leaves_no_gap(tmp_path, monkeypatch):
    with Leases(tmp_path, 60) as ending, Leases(tmp_path, 60) as claiming, Leases(tmp_path, 60) as third:
        ending.claim(0)

        def ends(worker: str) -> bool:
            ending.release(0)
            return False

        monkeypatch.setattr(claiming, "alive", ends)
        assert claiming.claim(0) == "taken over"
        assert third.claim(0) is None and third.active() == {0: claiming.worker.name}


def test_a_worker_that_is_thought_dead_while_it_gives_back_leaves_no_gap(tmp_path, monkeypatch):
    with Leases(tmp_path, 60) as slow, Leases(tmp_path, 60) as claiming, Leases(tmp_path, 60) as third:
        slow.claim(0)
        last = slow._last

        def taken_over_meanwhile(unit: int):
            found = last(unit)
            assert claiming.claim(0) == "taken over"
            return found

        monkeypatch.setattr(claiming, "alive", lambda worker: False)
        monkeypatch.setattr(slow, "_last", taken_over_meanwhile)
        slow.release(0)
        assert third.claim(0) is None and third.active() == {0: claiming.worker.name}


def test_a_lease_that_was_cleared_meanwhile_can_be_given_back(tmp_path, monkeypatch):
    with Leases(tmp_path, 60) as own, Leases(tmp_path, 60) as other:
        own.claim(0)
        last = own._last

        def cleared_meanwhile(unit: int):
            found = last(unit)
            other.clear()
            return found

        monkeypatch.setattr(own, "_last", cleared_meanwhile)
        own.release(0)
        assert other.claim(0) == "new"


def test_a_file_server_that_loses_its_answer_gives_the_lease_all_the_same(tmp_path, monkeypatch):
    link = os.link

    def asked_twice(*paths) -> None:
        link(*paths)
        link(*paths)

    with Leases(tmp_path, 60) as own, Leases(tmp_path, 60) as other:
        monkeypatch.setattr(os, "link", asked_twice)
        assert own.claim(0) == "new" and other.claim(0) is None
        assert not list((tmp_path / "leases").glob(".*"))


def test_a_killed_process_is_dead_at_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from tokscale.data.tokenization.leases import Leases\n"
        "leases = Leases(Path(sys.argv[1]), 600).__enter__(); leases.claim(0)\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    with Leases(tmp_path, 600) as own:
        assert own.claim(0) is None
        process.kill()
        process.wait()
        assert own.claim(0) == "taken over"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells a zombie by /proc")
def test_a_killed_process_that_nobody_has_waited_for_is_dead(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with Leases(tmp_path, 600) as own:
        me = own.worker
        started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        lease(tmp_path, 0, pretend(tmp_path, "killed", machine=me.machine, pid=process.pid, started=started))
        assert own.claim(0) is None
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie, and left one
        assert own.claim(0) == "taken over"
    process.wait()


def test_a_reused_pid_is_another_process(tmp_path):
    with Leases(tmp_path, 600) as own:
        me = own.worker
        lease(tmp_path, 0, pretend(tmp_path, "before", machine=me.machine, pid=me.pid, started="12345"))
        lease(tmp_path, 1, pretend(tmp_path, "now", machine=me.machine, pid=me.pid, started=me.started))
        assert own.claim(0) == "taken over" and own.claim(1) is None


@pytest.mark.parametrize("age,how", [(0, None), (50, None), (70, "taken over"), (1e6, "taken over")])
def test_elsewhere_only_signs_of_life_count(tmp_path, age, how):
    with Leases(tmp_path, 60) as own:
        lease(tmp_path, 0, pretend(tmp_path, "far", machine="other-boot/1", age=age))
        assert own.claim(0) == how


def test_who_only_looks_leaves_nothing(tmp_path):
    lease(tmp_path, 0, pretend(tmp_path, "far", machine="other-boot/1"))
    assert Leases(tmp_path, 60).active() == {0: "far"}
    assert [path.name for path in (tmp_path / "workers").iterdir()] == ["far.json"]


def test_a_lease_without_a_worker_is_free(tmp_path):
    with Leases(tmp_path, 60) as own:
        lease(tmp_path, 0, "nobody")
        lease(tmp_path, 1, pretend(tmp_path, "torn", machine="x"))
        (tmp_path / "workers" / "torn.json").write_text('{"name": "to')
        assert own.claim(0) == "taken over" and own.claim(1) == "taken over"


def test_a_worker_that_was_thought_dead_shows_itself_again(tmp_path):
    with Leases(tmp_path, 0.2) as own:
        sign = tmp_path / "workers" / f"{own.worker.name}.json"
        sign.unlink()
        deadline = time.monotonic() + 60
        while not sign.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert own.alive(own.worker.name)


def test_a_worker_that_is_thought_dead_while_it_looks_at_others_goes_on(tmp_path, monkeypatch):
    utime, sign_gone = os.utime, []

    with Leases(tmp_path, 60) as own:
        far = pretend(tmp_path, "far", machine="other-boot/1")
        sign = tmp_path / "workers" / f"{own.worker.name}.json"

        def taken_down_after(path, *times) -> None:
            utime(path, *times)
            if path == sign and not sign_gone:
                sign_gone.append(path)
                path.unlink()

        monkeypatch.setattr(os, "utime", taken_down_after)
        assert own.alive(far) and sign_gone and sign.exists()


def test_trouble_of_the_file_system_does_not_end_the_signs_of_life(tmp_path, monkeypatch):
    own, tries = Leases(tmp_path, 60), iter([False, False, True])
    shown = iter([StorageError("disk full"), OSError("stale handle")])

    def show() -> float:
        raise next(shown)

    monkeypatch.setattr(own._over, "wait", lambda seconds: next(tries))
    monkeypatch.setattr(own, "_touch_heartbeat", show)
    own._beat()
    assert next(shown, None) is None


def test_units_fail_for_good_after_their_attempts(tmp_path):
    attempts, me = Attempts(tmp_path, max_attempts=2, max_deaths=3), WorkerId.own()
    assert attempts.failed_for_good(7) is None
    attempts.add(7, "failed", "first", me)
    attempts.add(7, "died", "killed", me)
    attempts.add(7, "died", "killed", me)
    assert attempts.failed_for_good(7) is None
    attempts.add(7, "failed", "disk on fire", me)
    assert attempts.failed_for_good(7).startswith(
        "failed 2 times, last: disk on fire. "
    ) and "retry_failed=true" in attempts.failed_for_good(7)
    assert attempts.failed_for_good(8) is None
    attempts.clear(7)
    assert attempts.failed_for_good(7) is None
    for _ in range(3):
        attempts.add(8, "died", "killed", me)
    with open(tmp_path / "attempts" / "000008.jsonl", "a") as file:
        file.write('{"kind": "fai')  # killed while writing
    assert (
        attempts.failed_for_good(8) == "died 3 times, last: killed. When that is mended, retry_failed=true tries again"
    )


def test_what_others_keep_in_the_same_folders_is_neither_read_nor_removed(tmp_path):
    theirs = {}
    for name in ("leases/0000_x.png", "leases/2026", "leases/000001.txt", "workers/samples.json", "workers/000.json"):
        theirs[tmp_path / name] = name
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    with Leases(tmp_path, 60) as own:
        assert own.claim(3) == "new" and own.taken() == {3}
        dead = pretend(tmp_path, "far-1-0123abcd", machine="other-boot/1", age=1e6)
        own.forget_dead()
        own.clear()
        assert not (tmp_path / "workers" / f"{dead}.json").exists() and not own.taken()
    assert {path: path.read_text() for path in theirs} == theirs
