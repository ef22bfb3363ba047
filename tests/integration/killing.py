"""Processes that are killed at work: what the tests of tokenization and of stored states share."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from tokenize_process import work

WORKERS, KILLS = 3, 5
_NOT_CONTENT = {"attempts", "timings", "leases", "workers", ".closing", "stats.json"}


def fast_starting(*modules: str) -> ForkServerContext:
    """Starts processes that have these modules already, since importing them takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "tokscale.stages.tokenize", *modules])
    return context


@dataclass(frozen=True)
class Work:
    """Processes of `tokscale tokenize` on one folder of token shards."""

    processes: ForkServerContext
    root: Path
    """Holds the raw shards and the tokenizer."""
    tokens: Path
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Of the stage, beside those that all have."""

    def start(self, action: str, target: Callable[..., None] = work) -> ForkServerProcess:
        arguments = (str(self.root), str(self.tokens), action, dict(self.keys))
        process = self.processes.Process(target=target, args=arguments, daemon=True)
        process.start()
        return process

    def finish(self, action: str) -> None:
        process = self.start(action)
        process.join(120)
        assert process.exitcode == 0


def contents(folder: Path) -> dict[str, bytes]:
    """All files that have a meaning for others than the workers."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in files.items() if not _NOT_CONTENT & set(name.parts)}


def disturbed(work: Work, folder: Path, action: str, last: str, done: Callable[[], bool], seed: int) -> int:
    """Kill workers and start new ones, then let the work be finished; nobody leaves anything behind.

    Args:
        work: What is done.
        folder: Whose `leases` say who is at work.
        action: Of those that are killed.
        last: Action that finishes, begun while others are still at work.
        done: Whether there is nothing left to kill anybody over.
        seed: Of the moments.

    Returns:
        How many were killed at work.
    """
    chance, deadline, kills = random.Random(seed), time.monotonic() + 120, 0
    workers = [work.start(action) for _ in range(WORKERS)]
    try:
        while kills < KILLS and _kill_somebody(folder, chance, done, deadline):
            kills += 1
            workers.append(work.start(action))
        work.finish(last)
    finally:
        for worker in workers:
            worker.join(60)
            worker.kill()
            worker.join()
    left = [*work.tokens.rglob(".*.partial"), *(folder / "leases").glob("[0-9]*"), *(folder / "workers").iterdir()]
    assert not left
    return kills


def _kill_somebody(folder: Path, chance: random.Random, done: Callable[[], bool], deadline: float) -> bool:
    """SIGKILL a process that holds some of the work; False when all is done first."""
    while time.monotonic() < deadline:
        if held := [path for path in (folder / "leases").glob("[0-9]*") if _owner(path)]:
            time.sleep(chance.uniform(0, 0.08))
            try:
                if owner := _owner(chance.choice(held)):
                    os.kill(int(owner.split("-")[-2]), signal.SIGKILL)
                    return True
            except ProcessLookupError:
                pass
            continue
        if done():
            return False
        time.sleep(0.002)
    raise AssertionError("nobody works, and the work is not done")


def _owner(lease: Path) -> str:
    """Who has a lease, as `<host>-<pid>-<random>`; empty when it was given back."""
    try:
        return lease.read_text()
    except FileNotFoundError:
        return ""
