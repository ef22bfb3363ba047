"""The lock of a run folder where the kernel's lock does not reach: another machine's record, and a restart's count."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from tokscale.base.errors import EnvironmentRefused, StorageError
from tokscale.runs import lock, restarts
from tokscale.runs.lock import LOCK_FILE, FolderLock, RunFolderInUseError, holder
from tokscale.stages import tokenize_job


def leave(folder, host: str, job: str = "") -> None:
    words = f", job {job}" if job else ""
    (folder / LOCK_FILE).write_text(f"process 12 on {host}{words} since 2026-01-01 00:00:00\n")


@pytest.mark.parametrize("alive", [True, False])
def test_the_scheduler_says_whether_a_holder_on_another_machine_lives(tmp_path, monkeypatch, alive):
    monkeypatch.setattr(lock, "is_live", lambda job: alive if job == "7" else None)
    leave(tmp_path, "elsewhere", "7")
    if alive:
        with pytest.raises(RunFolderInUseError, match=r"process 12 on elsewhere, job 7 .* \(the scheduler says"):
            FolderLock(tmp_path, "8")
        assert holder(tmp_path) == "process 12 on elsewhere, job 7 since 2026-01-01 00:00:00"
    else:
        assert holder(tmp_path) is None
        FolderLock(tmp_path, "8").release()


def test_a_requeued_job_is_not_in_its_own_way(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "is_live", lambda job: True)
    leave(tmp_path, "elsewhere", "7")
    FolderLock(tmp_path, "7").release()


def test_without_a_scheduler_the_sign_of_life_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "is_live", lambda job: None)
    leave(tmp_path, "elsewhere")
    with pytest.raises(RunFolderInUseError, match="heartbeat 0 s ago, dead after 90 s"):
        FolderLock(tmp_path)
    long_ago = time.time() - 100
    os.utime(tmp_path / LOCK_FILE, (long_ago, long_ago))
    FolderLock(tmp_path).release()
    assert not list(tmp_path.glob(".clock*"))


def test_a_lock_is_not_written_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("all I have")
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match="is a link"):
        FolderLock(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "all I have"


def test_this_machines_dead_hold_nothing_and_the_living_show_it(tmp_path, monkeypatch):
    leave(tmp_path, socket.gethostname())
    monkeypatch.setattr(lock, "_REFRESH", 0.01)
    held = FolderLock(tmp_path, "7")
    os.utime(tmp_path / LOCK_FILE, (0, 0))
    deadline = time.monotonic() + 120
    while (tmp_path / LOCK_FILE).stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / LOCK_FILE).stat().st_mtime > 0
    held.release()
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_who_looks_does_not_keep_a_job_from_starting(tmp_path, monkeypatch):
    with open(tmp_path / LOCK_FILE, "w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        waits = []

        def done_looking(seconds: float) -> None:
            waits.append(seconds)
            fcntl.flock(looking, fcntl.LOCK_UN)

        monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=done_looking, strftime=time.strftime))
        FolderLock(tmp_path).release()
    assert len(waits) == 1


def test_a_job_may_start_while_the_scheduler_is_asked_about_the_one_before(tmp_path, monkeypatch):
    leave(tmp_path, "elsewhere", "7")
    started = []

    def starts_meanwhile(job: str) -> bool:
        if not started:
            started.append(job)
            FolderLock(tmp_path, "8").release()
        return False

    monkeypatch.setattr(lock, "is_live", starts_meanwhile)
    waits = lambda seconds: pytest.fail("who looks holds the lock")  # noqa: E731
    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=waits, strftime=time.strftime))
    assert holder(tmp_path) is None and started


def test_a_forked_child_does_not_keep_what_was_released(tmp_path):
    held = FolderLock(tmp_path)
    child = os.dup(held._file.fileno())  # shares the lock as a fork would
    held.release()
    FolderLock(tmp_path).release()
    os.close(child)


def start(folder, monkeypatch, restart: int, step: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    monkeypatch.setattr(restarts, "newest_step", lambda folder: step)
    restarts.note_start(folder)


def test_starts_that_get_nowhere_come_to_an_end(tmp_path, monkeypatch):
    for restart in range(3):
        start(tmp_path, monkeypatch, restart, 50)
    with pytest.raises(EnvironmentRefused, match="job 7 was started 4 times at step 50") as caught:
        start(tmp_path, monkeypatch, 3, 50)
    assert caught.value.exit_code == 69 and len(restarts.read_starts(tmp_path)) == 4


def test_a_start_that_found_something_new_counts_from_the_beginning(tmp_path, monkeypatch):
    for restart, step in enumerate([0, 0, 0, 50, 50, 50, 100]):
        start(tmp_path, monkeypatch, restart, step)
    with open(tmp_path / restarts.STARTS_FILE, "a") as file:
        file.write('{"torn')
    assert [row["step"] for row in restarts.read_starts(tmp_path)] == [0, 0, 0, 50, 50, 50, 100]
    assert json.loads((tmp_path / restarts.STARTS_FILE).read_text().splitlines()[0])["job"] == "7"


def test_someone_elses_starts_do_not_count(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for _ in range(6):
        restarts.note_start(tmp_path)


# ------------------------------------------------------------------------------- file systems without such locks


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def without_flock(request, monkeypatch):
    def refused(file, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(lock, "_SETTLE", 0.0)


def test_the_record_and_its_heartbeat_decide_where_the_kernel_has_no_locks(tmp_path, without_flock):
    assert holder(tmp_path) is None
    held = FolderLock(tmp_path, "7")
    assert holder(tmp_path) == held.record
    with pytest.raises(RunFolderInUseError, match=f"process {os.getpid()} on .*on this machine; heartbeat"):
        FolderLock(tmp_path, "8")
    held.release()
    assert holder(tmp_path) is None
    FolderLock(tmp_path, "8").release()


def test_a_dead_holder_on_this_machine_is_not_waited_for(tmp_path, without_flock):
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / LOCK_FILE).write_text(
        f"process {int(done.stdout)} on {socket.gethostname()} since 2026-01-01 00:00:00\n"
    )
    assert holder(tmp_path) is None
    FolderLock(tmp_path).release()


def test_of_two_that_come_at_once_the_first_line_has_the_folder(tmp_path, without_flock, monkeypatch):
    first = f"process 12 on {socket.gethostname()} since 2026-01-01 00:00:00"

    def late(seconds: float) -> None:
        mine = (tmp_path / LOCK_FILE).read_text()
        (tmp_path / LOCK_FILE).write_text(f"{first}\n{mine}")

    monkeypatch.setattr(lock.time, "sleep", late)
    with pytest.raises(RunFolderInUseError, match=r"process 12 .* came at the same time"):
        FolderLock(tmp_path)


def test_other_refusals_of_the_kernel_are_not_taken_for_that(tmp_path, monkeypatch):
    def broken(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"):
        FolderLock(tmp_path)


def test_closing_a_data_set_takes_turns_without_the_kernels_locks(tmp_path, without_flock, monkeypatch):
    monkeypatch.setattr(tokenize_job, "_TURN_SECONDS", 0.01)
    inside = threading.Event()

    def other() -> None:
        with tokenize_job.alone(SimpleNamespace(folder=tmp_path)):
            inside.set()

    with tokenize_job.alone(SimpleNamespace(folder=tmp_path)):
        thread = threading.Thread(target=other)
        thread.start()
        assert not inside.wait(0.3)
    thread.join(30)
    assert inside.is_set()
