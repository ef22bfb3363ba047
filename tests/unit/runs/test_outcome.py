"""Who ended how in a run folder, whatever ran beside it and however it died."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokscale.base.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    PeerLostError,
    StalledError,
    StopRequested,
    StorageError,
)
from tokscale.dist.env import ProcessEnv
from tokscale.dist.slurm import NodesRefusedError
from tokscale.runs.outcome import ATTEMPT, EXIT_FILE, Attempt, RunFolderRefused, comes_again, read_exit, read_outcomes
from tokscale.runs.stage import StageResult

ALONE = ProcessEnv()
DONE = StageResult("done")


def begun(folder: Path, stage: str, env: ProcessEnv = ALONE) -> Attempt:
    attempt = Attempt(folder, stage, env)
    attempt.begin()
    return attempt


def begun_elsewhere(folder: Path, stage: str) -> subprocess.Popen:
    """A process that has begun a stage and goes on until it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from tokscale.dist.env import ProcessEnv\n"
        "from tokscale.runs.outcome import Attempt\n"
        f"Attempt(Path(sys.argv[1]), {stage!r}, ProcessEnv()).begin(); print('begun', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


def states(folder: Path) -> dict[str, str]:
    return {outcome["stage"]: outcome["state"] for outcome in read_outcomes(folder)}


def lines(folder: Path) -> list[list[str]]:
    return [path.read_text().split() for path in sorted(folder.glob("outcomes/*/*.line"))]


def test_a_killed_training_leaves_no_success_although_an_export_beside_it_ended_well(tmp_path):
    training = begun_elsewhere(tmp_path, "train")
    try:
        begun(tmp_path, "export").succeed(DONE, seconds=1.0)
        assert read_exit(tmp_path) is None  # the training may still come to harm
        assert states(tmp_path) == {"train": "running", "export": "ended"}
    finally:
        training.send_signal(signal.SIGKILL)
        training.wait()
    assert read_exit(tmp_path) is None
    assert states(tmp_path) == {"train": "killed", "export": "ended"}
    assert [line[0:1] + line[2:] for line in lines(tmp_path)] == [["export", "0", "no"], ["train", "-", "-"]]
    begun(tmp_path, "export").succeed(DONE, seconds=1.0)  # nobody runs any more
    left = read_exit(tmp_path)
    assert left is not None and (left["stage"], left["code"]) == ("export", 0)


def test_each_attempt_has_a_record_and_a_line_for_hosts_without_python(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    begun(tmp_path, "train", ProcessEnv(job="81")).fail(75, StopRequested("asked to"))
    record = json.loads((tmp_path / "outcomes/train/81.2.json").read_text())
    assert (tmp_path / "outcomes/train/81.2.line").read_text() == "train 81.2 75 yes\n"
    wanted = {"stage": "train", "attempt": "81.2", "code": 75, "again": True, "job": "81", "restart": 2, "rank": 0}
    assert record.items() >= wanted.items() and record["node"] == "node7" and record["host"] == socket.gethostname()
    left = read_exit(tmp_path)
    assert left is not None and left.items() >= wanted.items()


def test_a_batch_script_may_name_the_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv(ATTEMPT, "../my job/1")
    begun(tmp_path, "train").succeed(DONE, seconds=1.0)
    assert lines(tmp_path) == [["train", "-my-job-1", "0", "no"]]


def test_earlier_ends_of_the_same_attempt_are_kept_beside_it(tmp_path):
    job = ProcessEnv(job="5")
    for code in (65, 74, 0):
        attempt = begun(tmp_path, "train", job)
        if code:
            attempt.fail(code, DataError(f"{code}"))
        else:
            attempt.succeed(DONE, seconds=1.0)
    assert {line[1]: line[2] for line in lines(tmp_path)} == {"5.0.1": "65", "5.0.2": "74", "5.0": "0"}
    assert [outcome["code"] for outcome in read_outcomes(tmp_path)] == [65, 74, 0]


def test_two_processes_of_one_job_side_by_side_do_not_share_an_attempt(tmp_path):
    job = ProcessEnv(job="5")
    begun(tmp_path, "tokenize", job)
    record = tmp_path / "outcomes/tokenize/5.0.json"
    other = json.loads(record.read_text()) | {"pid": os.getppid(), "started": _ticks(os.getppid())}
    record.write_text(json.dumps(other))
    mine = begun(tmp_path, "tokenize", job)
    assert mine.name == "5.0.1" and Attempt(tmp_path, "tokenize", job)._marked()
    mine.succeed(DONE, seconds=1.0)
    assert json.loads(record.read_text())["code"] is None and read_exit(tmp_path) is None


def _ticks(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def test_the_first_failure_of_an_attempt_stays_unless_it_only_followed_from_another_ranks(tmp_path):
    ranks = [ProcessEnv(rank=rank, world=2, job="9", launcher="slurm") for rank in range(2)]
    begun(tmp_path, "train", ranks[0])
    Attempt(tmp_path, "train", ranks[0]).fail(76, PeerLostError("rank 1 is gone"))
    assert lines(tmp_path) == [["train", "9.0", "76", "yes"]]
    Attempt(tmp_path, "train", ranks[1]).fail(77, NonFiniteError("loss"))
    Attempt(tmp_path, "train", ranks[0]).fail(1, RuntimeError("alone"))
    assert lines(tmp_path) == [["train", "9.0", "77", "no"]]
    left = read_exit(tmp_path)
    assert left is not None and (left["code"], left["rank"], left["message"]) == (77, 1, "NonFiniteError: loss")


def test_a_failure_that_another_rank_left_first_is_not_taken_away_by_the_main_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_ID", "3")
    ranks = [ProcessEnv(rank=rank, world=2, job="9", launcher="slurm") for rank in range(2)]
    Attempt(tmp_path, "train", ranks[1]).fail(65, DataError("torn"), create=True)
    begun(tmp_path, "train", ranks[0])
    assert lines(tmp_path) == [["train", "9.0", "65", "no"]]
    monkeypatch.setenv("SLURM_STEP_ID", "4")  # the next step of the same job is another start
    begun(tmp_path, "train", ranks[0])
    assert lines(tmp_path) == [["train", "9.0.1", "65", "no"], ["train", "9.0", "-", "-"]]


def test_a_success_does_not_hide_the_failure_of_another_rank(tmp_path):
    ranks = [ProcessEnv(rank=rank, world=2, job="9", launcher="slurm") for rank in range(2)]
    begun(tmp_path, "train", ranks[0]).succeed(DONE, seconds=1.0)
    Attempt(tmp_path, "train", ranks[1]).fail(74, StorageError("full"))
    assert lines(tmp_path) == [["train", "9.0", "74", "no"]]


def test_who_is_refused_leaves_the_folders_end_alone(tmp_path):
    begun(tmp_path, "train").succeed(DONE, seconds=1.0)
    before = (tmp_path / "exit.json").read_bytes()
    attempt = begun(tmp_path, "sample")
    attempt.refused(RunFolderRefused("another run"), give_back=True)
    assert (tmp_path / "exit.json").read_bytes() == before
    assert [outcome["stage"] for outcome in read_outcomes(tmp_path) if outcome.get("refused")] == ["sample"]


def test_a_folder_that_is_not_there_is_not_made_but_for_a_job_of_several_ranks(tmp_path):
    attempt = begun(tmp_path / "new", "train")
    attempt.fail(64, ConfigError("typo"))
    assert not (tmp_path / "new").exists()
    attempt.fail(64, ConfigError("typo"), create=True)
    assert lines(tmp_path / "new")[0][2:] == ["64", "no"]


def test_an_attempt_on_another_machine_lives_as_long_as_its_scheduler_or_its_record_says(tmp_path, monkeypatch):
    attempt = begun(tmp_path, "train", ProcessEnv(job="7"))
    record = json.loads(attempt.path.read_text()) | {"host": "elsewhere"}
    attempt.path.write_text(json.dumps(record))
    for live, state in ((True, "running"), (False, "killed"), (None, "running")):
        monkeypatch.setattr("tokscale.runs.process.is_live", lambda job, live=live: live)
        assert states(tmp_path) == {"train": state}
    long_ago = time.time() - 1000
    os.utime(attempt.path, (long_ago, long_ago))
    assert states(tmp_path) == {"train": "killed"}


def test_a_record_that_a_kill_or_a_hand_has_torn_is_passed_over(tmp_path):
    begun(tmp_path, "train").fail(65, DataError("torn"))
    for number, text in enumerate(("", "{", "[]", '{"stage": "train"}', "\udcff")):
        (tmp_path / f"outcomes/train/x{number}.json").write_text(text, errors="surrogateescape")
    assert states(tmp_path) == {"train": "ended"}
    begun(tmp_path, "train").succeed(DONE, seconds=1.0)


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="the superuser may write everywhere")
def test_a_folder_that_may_only_be_read_is_left_as_it_is(tmp_path):
    begun(tmp_path, "train").succeed(DONE, seconds=1.0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code = (
        "import sys; from pathlib import Path; from tokscale.dist.env import ProcessEnv\n"
        "from tokscale.runs.outcome import Attempt; from tokscale.runs.stage import StageResult\n"
        "attempt = Attempt(Path(sys.argv[1]), 'sample', ProcessEnv()); attempt.begin()\n"
        "attempt.succeed(StageResult('drew'), seconds=1.0)"
    )
    for folder in (*(path for path in tmp_path.rglob("*") if path.is_dir()), tmp_path):
        folder.chmod(0o555)
    drop = ["setpriv", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    subprocess.run([*drop, sys.executable, "-c", code, str(tmp_path)], check=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (StopRequested("signal"), True),
        (StopRequested("STOP", again=False), False),
        (StalledError("late"), True),
        (PeerLostError("gone"), True),
        (NodesRefusedError("bad", ["n1"]), True),
        (NonFiniteError("loss"), False),
        (StorageError("full"), False),
        (MemoryError(), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_only_what_the_same_job_may_do_better_comes_again(error, again):
    assert comes_again(error) is again


def test_a_pipe_in_the_place_of_how_it_ended_last_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / EXIT_FILE)
    signal.alarm(30)  # nobody will ever write into it
    try:
        Attempt(tmp_path, "train", ProcessEnv()).begin()
    finally:
        signal.alarm(0)
    assert not (tmp_path / EXIT_FILE).exists()
