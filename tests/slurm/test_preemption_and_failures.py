"""Preemption and failures on a real scheduler: the losses of an undisturbed run, or an exit code that says why not."""

import json
import os
import re
import signal
import stat
import sys

import pytest
from slurm_jobs import log_of, losses, trainers, wait_for

from tokscale.checkpoint.commit import checkpoint_folders
from tokscale.cli import main
from tokscale.runs.restarts import read_starts
from tokscale.runs.submitted import read_submissions


def at_step(run_dir, step):
    return lambda: len(losses(run_dir)) >= step


def left_behind(run_dir) -> int:
    return json.loads((run_dir / "exit.json").read_text())["code"]


def assert_undisturbed(pipeline, run_dir, job, expected, *, restarts: int) -> None:
    ended = pipeline.cluster.ended(job)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == str(restarts), log_of(run_dir)[-6000:]
    assert losses(run_dir) == expected
    assert left_behind(run_dir) == 0 and len(read_starts(run_dir)) == restarts + 1


def test_warned_before_preemption_it_saves_and_comes_again_equal_to_the_bit(pipeline, undisturbed, tmp_path):
    job = pipeline.submit(tmp_path / "run", TOKSCALE_CACHE=str(tmp_path / "cache"))
    wait_for(at_step(tmp_path / "run", 20), tmp_path / "run")
    (cache,) = (tmp_path / "cache").glob("tokscale-*/live")  # both nodes are this machine
    assert [mark.name for mark in (cache / "users").iterdir()] == [job]
    (cache / "kernel").touch()
    pipeline.cluster.call("scancel", "--signal=USR1", job)
    wait_for(lambda: len(read_starts(tmp_path / "run")) == 2, tmp_path / "run")
    assert (cache / "kernel").exists()  # it comes again
    assert_undisturbed(pipeline, tmp_path / "run", job, undisturbed, restarts=1)
    assert not cache.exists()
    log = log_of(tmp_path / "run")
    assert "requeueing job" in log and "the state is saved" in log
    first, second = read_starts(tmp_path / "run")
    assert first["step"] == 0 and second["step"] >= 20  # nothing was lost but the time


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(pipeline, undisturbed, tmp_path):
    job = pipeline.submit(tmp_path / "run")
    wait_for(at_step(tmp_path / "run", 70), tmp_path / "run")
    os.kill(trainers(tmp_path / "run")[-1], signal.SIGKILL)
    assert_undisturbed(pipeline, tmp_path / "run", job, undisturbed, restarts=1)
    # srun ends with the highest code: that of the killed rank, or of the other one when it was still there to be ended.
    assert re.search(r"a rank was killed or lost \(code (137|143)\)|ended with 76", log_of(tmp_path / "run"))
    assert read_starts(tmp_path / "run")[1]["step"] >= 50


def test_of_two_jobs_on_one_run_folder_the_second_is_refused_until_the_first_is_dead(pipeline, tmp_path):
    words = ("loop.total_steps=100000",)
    first = pipeline.submit(tmp_path / "run", *words, nodes=1, TOKSCALE_MAX_FAILURES="0")
    wait_for(at_step(tmp_path / "run", 1), tmp_path / "run")
    second = pipeline.submit(tmp_path / "run", *words, nodes=1)
    ended = pipeline.cluster.ended(second)
    assert ended["ExitCode"] == "69:0" and "in use by process" in log_of(tmp_path / "run")
    assert f"job {first} since" in log_of(tmp_path / "run")
    assert pipeline.cluster.job(first)["JobState"] == "RUNNING" and not (tmp_path / "run/exit.json").exists()
    (victim,) = trainers(tmp_path / "run")
    os.kill(victim, signal.SIGKILL)  # its death frees the folder
    assert pipeline.cluster.ended(first)["ExitCode"] == "137:0"
    done = len(checkpoint_folders(tmp_path / "run/checkpoints"))
    third = pipeline.submit(tmp_path / "run", *words, nodes=1, TOKSCALE_MAX_FAILURES="0")
    wait_for(lambda: len(read_starts(tmp_path / "run")) == 2, tmp_path / "run")
    pipeline.cluster.call("scancel", third)
    assert pipeline.cluster.ended(third)["JobState"] == "CANCELLED"
    assert len(checkpoint_folders(tmp_path / "run/checkpoints")) >= min(done, 1)


@pytest.mark.long
def test_requeued_by_an_operator(pipeline, undisturbed, tmp_path):
    job = pipeline.submit(tmp_path / "run")
    wait_for(at_step(tmp_path / "run", 20), tmp_path / "run")
    pipeline.cluster.call("scontrol", "requeue", job)
    assert_undisturbed(pipeline, tmp_path / "run", job, undisturbed, restarts=1)


@pytest.mark.long
def test_a_node_goes_down_and_comes_back(pipeline, undisturbed, tmp_path):
    job = pipeline.submit(tmp_path / "run")
    wait_for(at_step(tmp_path / "run", 70), tmp_path / "run")
    pipeline.cluster.call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    wait_for(lambda: pipeline.cluster.job(job)["Restarts"] == "1", tmp_path / "run")
    pipeline.cluster.call("scontrol", "update", "nodename=n2", "state=resume")
    assert_undisturbed(pipeline, tmp_path / "run", job, undisturbed, restarts=1)


@pytest.mark.long
def test_stopped_on_two_nodes_it_goes_on_with_one(pipeline, undisturbed, tmp_path):
    job = pipeline.submit(tmp_path / "run")
    wait_for(at_step(tmp_path / "run", 20), tmp_path / "run")
    (tmp_path / "run/STOP").touch()
    assert pipeline.cluster.ended(job)["ExitCode"] == "75:0"  # a person's wish: not requeued
    assert left_behind(tmp_path / "run") == 75
    stopped = len(losses(tmp_path / "run"))
    again = pipeline.submit(tmp_path / "run", nodes=1)
    assert pipeline.cluster.ended(again)["JobState"] == "COMPLETED", log_of(tmp_path / "run")[-6000:]
    found = losses(tmp_path / "run")
    assert found[:stopped] == undisturbed[:stopped]
    assert found[stopped] == pytest.approx(undisturbed[stopped], rel=1e-6)
    assert found[stopped : stopped + 20] == pytest.approx(undisturbed[stopped : stopped + 20], rel=1e-5)


@pytest.mark.long
def test_before_its_time_is_over_it_saves_and_comes_again(pipeline, tmp_path):
    # Slurm counts whole minutes, and this model would be done in seconds: it trains on until the second time.
    words = ("loop.total_steps=100000", "checkpoint.every_steps=100000")
    job = pipeline.submit(tmp_path / "run", *words, nodes=1, flags=("--time=1", "--signal=USR2@1"))
    wait_for(lambda: len(read_starts(tmp_path / "run")) == 2, tmp_path / "run")
    assert "(Slurm time limit); the state is saved" in log_of(tmp_path / "run")
    assert read_starts(tmp_path / "run")[1]["step"] > 0
    pipeline.cluster.call("scancel", job)
    assert pipeline.cluster.ended(job)["JobState"] == "CANCELLED" and pipeline.cluster.job(job)["Restarts"] == "1"


@pytest.mark.long
def test_a_bad_node_is_named_and_avoided(pipeline, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    fake = tools / "nvidia-smi"
    fake.write_text(
        '#!/bin/bash\n[[ $SLURMD_NODENAME == n1 ]] || exit 0\nprintf "GPU 00000000:01:00.0\\n    Remapped Rows\\n'
        '        Remapping Failure Occurred : Yes\\n"\n'
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    words = ("preflight={when: always, exclude_bad_nodes: true}", "loop.total_steps=5")
    job = pipeline.submit(tmp_path / "run", *words, nodes=1, PATH=f"{tools}:{os.environ['PATH']}")
    ended = pipeline.cluster.ended(job)
    assert ended["JobState"] == "COMPLETED" and ended["NodeList"] == "n2" and ended["ExcNodeList"] == "n1"
    assert "node n1: GPU 00000000:01:00.0: Remapped Rows" in log_of(tmp_path / "run")


@pytest.mark.long
def test_a_stalled_rank_ends_the_run_named_and_the_job_goes_on(pipeline, undisturbed, tmp_path):
    limits = "watchdog={step_seconds: 15, heartbeat_seconds: 1, grace_seconds: 3}"
    job = pipeline.submit(tmp_path / "run", limits)
    wait_for(at_step(tmp_path / "run", 70), tmp_path / "run")
    os.kill(trainers(tmp_path / "run")[-1], signal.SIGSTOP)
    assert_undisturbed(pipeline, tmp_path / "run", job, undisturbed, restarts=1)
    log = log_of(tmp_path / "run")
    assert "stalled: no heartbeat of rank" in log and "ended with 76 (failed" in log
    assert any(
        "MainThread" in path.read_text() or "Thread" in path.read_text()
        for path in (tmp_path / "run/logs").glob("stacks_*")
    )


@pytest.mark.long
def test_a_job_that_gets_nowhere_is_not_started_for_ever(pipeline, tmp_path):
    words = ("checkpoint.every_steps=100000", "loop.total_steps=100000")
    job = pipeline.submit(tmp_path / "run", *words, nodes=1)
    for start in range(1, 4):
        wait_for(
            lambda start=start: len(read_starts(tmp_path / "run")) == start and bool(trainers(tmp_path / "run")),
            tmp_path / "run",
        )
        os.kill(trainers(tmp_path / "run")[0], signal.SIGKILL)
    assert pipeline.cluster.ended(job)["ExitCode"] == "69:0", log_of(tmp_path / "run")
    assert "saved nothing in between" in log_of(tmp_path / "run")


@pytest.mark.long
def test_preempted_by_a_job_of_more_weight_it_saves_and_comes_again(pipeline, undisturbed, tmp_path):
    job = pipeline.submit(tmp_path / "run", TOKSCALE_MAX_FAILURES="0")
    wait_for(at_step(tmp_path / "run", 20), tmp_path / "run")
    pipeline.cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    assert_undisturbed(pipeline, tmp_path / "run", job, undisturbed, restarts=1)
    assert read_starts(tmp_path / "run")[1]["step"] >= 20 and read_starts(tmp_path / "run")[1]["after"] == "preempted"


@pytest.mark.long
def test_preempted_at_its_start_it_is_no_failure(pipeline, tmp_path):
    slow = tmp_path / "slow"
    slow.write_text(
        f'#!/usr/bin/env bash\n[[ -n ${{SLURM_RESTART_COUNT:-}} ]] || exec sleep 600\nexec {sys.executable} "$@"\n'
    )
    slow.chmod(0o755)
    job = pipeline.submit(tmp_path / "run", "loop.total_steps=5", TOKSCALE_PYTHON=str(slow), TOKSCALE_MAX_FAILURES="0")
    wait_for(lambda: "start 0 on" in log_of(tmp_path / "run"), tmp_path / "run")
    pipeline.cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    ended = pipeline.cluster.ended(job)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1", log_of(tmp_path / "run")
    assert read_starts(tmp_path / "run")[0]["after"] == "preempted"


@pytest.mark.long
def test_an_interface_that_one_node_lacks_is_named_before_the_ranks_meet(pipeline, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n[[ $SLURMD_NODENAME != n2 ]] || export GLOO_SOCKET_IFNAME=ib7\n"
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    job = pipeline.submit(tmp_path / "run", TOKSCALE_PYTHON=str(python), TOKSCALE_INTERFACE="lo")
    ended = pipeline.cluster.ended(job)
    assert ended["ExitCode"] == "69:0" and ended["Restarts"] == "0"
    assert "node n2: GLOO_SOCKET_IFNAME=ib7 is none of its interfaces" in log_of(tmp_path / "run")


@pytest.mark.long
def test_a_site_that_exports_nothing_loses_no_setting(cluster, pipeline, tmp_path, monkeypatch):
    for name, value in cluster.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    words = [f"recipe={pipeline.recipe}", f"run_dir={tmp_path}/run", "cluster=local", "stages=[train]"]
    words += ["train.loop.total_steps=3", "cluster.env={DS_ACCELERATOR: cpu, OMP_NUM_THREADS: 1}"]
    monkeypatch.setenv("RANK", "5")
    assert main(["submit", *words]) == 0
    (job,) = read_submissions(tmp_path / "run")[0].jobs
    ended = cluster.ended(job.job)
    assert ended["JobState"] == "COMPLETED", "".join(p.read_text() for p in (tmp_path / "run/logs").glob("slurm-*"))
    assert main(["status", f"run_dir={tmp_path}/run"]) == 0
