"""Why a job ended decides whether it comes again, not the highest code of any rank."""

import json
import os
import signal
import socket
import stat
import sys
from pathlib import Path

import pytest
from slurm_jobs import ROOT, log_of, trainers, wait_for

from tokscale.runs.restarts import read_starts

_INTERPRETER = """#!/usr/bin/env bash
exec {python} {program} "$@"
"""
_FAULTY = """
import os, sys, time
import torch
import tokscale.train.task as task
from tokscale.cli import main

def step(self, batch, step, real=task.SingleModelTask.step):
    if step == 10:
        {fault}
    return real(self, batch, step)

task.SingleModelTask.step = step
sys.exit(main(sys.argv[3:]))
"""
_SLOW = """
import pathlib, sys, time
import tokscale.stages.{stage} as stage
from tokscale.cli import main

def run(config, env):
    pathlib.Path("{began}").touch()
    time.sleep(600)

stage.run = run
sys.exit(main(sys.argv[3:]))
"""
# Rank 0 hangs as in a kernel that waits for the other rank for ever, and has to be killed.
OUT_OF_MEMORY = """
        if os.environ["SLURM_PROCID"] == "0":
            time.sleep(3600)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")"""


def faulty(folder: Path, fault: str) -> str:
    """An interpreter that runs `tokscale` with a fault at step 10."""
    program, interpreter = folder / "faulty.py", folder / "faulty"
    program.write_text(_FAULTY.format(fault=fault))
    interpreter.write_text(_INTERPRETER.format(python=sys.executable, program=program))
    interpreter.chmod(interpreter.stat().st_mode | stat.S_IXUSR)
    return str(interpreter)


def not_requeued(pipeline, run_dir, job) -> tuple[dict[str, str], str]:
    ended = pipeline.cluster.ended(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), log_of(run_dir)[-4000:]
    assert "not requeued" in log_of(run_dir)
    return ended, log_of(run_dir)


def test_memory_that_runs_out_on_one_rank_is_not_tried_again(pipeline, tmp_path):
    job = pipeline.submit(tmp_path / "run", TOKSCALE_PYTHON=faulty(tmp_path, OUT_OF_MEMORY))
    ended, _ = not_requeued(pipeline, tmp_path / "run", job)
    left = json.loads((tmp_path / "run/exit.json").read_text())
    assert "out of memory" in left["message"].lower() and left["rank"] == 1 and left["job"] == job
    assert ended["ExitCode"] == f"{left['code']}:0" and left["node"] == "n2"


def test_a_rank_that_crashes_before_all_have_met_is_not_tried_again(pipeline, tmp_path):
    interpreter = tmp_path / "crashing"
    interpreter.write_text("#!/usr/bin/env bash\nkill -SEGV $$\n")
    interpreter.chmod(0o755)
    job = pipeline.submit(tmp_path / "run", TOKSCALE_PYTHON=str(interpreter), nodes=1)
    _, log = not_requeued(pipeline, tmp_path / "run", job)
    assert "before all ranks had met" in log


def test_a_busy_port_is_named_and_not_tried_again(pipeline, tmp_path):
    expected = int(pipeline.cluster.submit("--wrap", "true")) + 1
    with socket.socket() as busy:
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        busy.bind(("", 12000 + expected * 31 % 20000))
        busy.listen()
        job = pipeline.submit(tmp_path / "run")
        assert int(job) == expected
        _, log = not_requeued(pipeline, tmp_path / "run", job)
    assert str(12000 + expected * 31 % 20000) in log


@pytest.mark.long
def test_a_killed_rank_comes_again_at_most_so_often(pipeline, tmp_path):
    words = ("loop.total_steps=100000", "checkpoint.every_steps=10")
    job = pipeline.submit(tmp_path / "run", *words, nodes=1, TOKSCALE_MAX_FAILURES="1")
    for start in (1, 2):
        wait_for(lambda start=start: len(read_starts(tmp_path / "run")) == start, tmp_path / "run")
        wait_for(lambda: len(trainers(tmp_path / "run")) == 1, tmp_path / "run")
        os.kill(trainers(tmp_path / "run")[0], signal.SIGKILL)
    ended = pipeline.cluster.ended(job)
    assert ended["Restarts"] == "1" and "at most 1 are allowed" in log_of(tmp_path / "run")


@pytest.mark.parametrize("stage", ["prepare", "export"])
def test_a_stage_that_keeps_nothing_says_that_its_time_is_too_short(cluster, stage, tmp_path):
    program, interpreter = tmp_path / "slow.py", tmp_path / "slow"
    program.write_text(_SLOW.format(stage=stage, began=tmp_path / "began"))
    interpreter.write_text(_INTERPRETER.format(python=sys.executable, program=program))
    interpreter.chmod(0o755)
    run_dir = tmp_path / "run"
    environ = {"TOKSCALE_PYTHON": str(interpreter), "DS_ACCELERATOR": "cpu"}
    flags = ("--cpus-per-task=1", f"--output={run_dir}.log", str(ROOT / f"slurm/{stage}.sbatch"))
    source = ("source={kind: shapes, count: 5}",) if stage == "prepare" else ()
    job = cluster.submit(*flags, f"run_dir={run_dir}", *source, environ=environ)
    wait_for(lambda: (tmp_path / "began").exists(), run_dir)
    cluster.call("scancel", "--signal=USR1", job)
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), log_of(run_dir)
    assert f"time limit is too short for {stage}" in log_of(run_dir)
