"""Processes that draw the same prompts and are killed at it: no prompt is lost, and bytes are those of one alone."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_exports
from sample_process import draw

from tokscale.base.files import read_json

PROMPTS, KILLS = 60, 2


def start(processes: Any, folder: Path, out: Path, rank: int, world: int) -> Any:
    process = processes.Process(target=draw, args=(str(folder), str(out), rank, world), daemon=True)
    process.start()
    return process


def kill_one_at_work(out: Path, killed: set[int]) -> bool:
    """SIGKILL a process that is drawing a unit; False when all is drawn first."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out / "samples.json").exists():
        for lease in (out / ".drawing" / "leases").glob("[0-9]*"):
            owner = lease.read_text()
            if owner and (number := int(owner.split("-")[-2])) not in killed:
                killed.add(number)
                os.kill(number, signal.SIGKILL)
                return True
        time.sleep(0.002)
    return False


@pytest.mark.long
def test_killed_processes_lose_nothing(tmp_path):
    tiny_exports.make_exports(tmp_path)
    (tmp_path / "prompts.txt").write_text("".join(f"a small red circle, number {n}\n" for n in range(PROMPTS)))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["sample_process"])
    workers = [start(processes, tmp_path, tmp_path / "out", rank, 3) for rank in (1, 2)]
    killed: set[int] = set()
    try:
        while len(killed) < KILLS and kill_one_at_work(tmp_path / "out", killed):
            workers.append(start(processes, tmp_path, tmp_path / "out", 1 + len(killed) % 2, 3))
        assert len(killed) == KILLS, "all was drawn before anybody could be killed"
        main = start(processes, tmp_path, tmp_path / "out", 0, 3)
        workers.append(main)
        main.join(120)
        assert main.exitcode == 0
    finally:
        for worker in workers:
            worker.join(30)
            worker.kill()
            worker.join()
    alone = start(processes, tmp_path, tmp_path / "alone", 0, 1)
    alone.join(120)
    rows = read_json(tmp_path / "out" / "samples.json")["images"]
    assert [row["number"] for row in rows] == list(range(PROMPTS))
    shown = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}  # noqa: E731
    assert shown(tmp_path / "out") == shown(tmp_path / "alone")
    assert not list((tmp_path / "out").rglob("*.partial"))
