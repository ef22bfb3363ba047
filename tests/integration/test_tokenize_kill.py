"""Workers die at any moment, by SIGKILL; what they were making is made once, to the last byte as if undisturbed."""

import io
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenize_process import work

from tokscale.data.raw_shards import RawRecord, write_shard
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.dvae.model import DiscreteVAE
from tokscale.tokenizers.image import save_image_tokenizer

UNITS, WORKERS, KILLS = 6, 3, 5


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "tokscale.stages.tokenize"])  # imports are slow
    return context


@pytest.fixture(scope="module")
def root(tmp_path_factory, processes) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    with torch.random.fork_rng():
        config = DiscreteVAEConfig(image_size=16, num_tokens=64, codebook_dim=8, num_layers=2, hidden_dim=8)
        save_image_tokenizer(DiscreteVAE(config), folder / "tokenizer")
    values = np.random.default_rng(0)
    for shard in range(UNITS):
        records = [_record(shard, row, values) for row in range(60)]
        write_shard(folder / "raw" / f"{shard:05d}.tar", records)
        (folder / "raw" / f"{shard:05d}_stats.json").write_text('{"successes": 60}')
    _finish(processes, folder, folder / "undisturbed")
    return folder


def _record(shard: int, row: int, values: np.random.Generator) -> RawRecord:
    stream = io.BytesIO()
    Image.fromarray(values.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(stream, "PNG")
    data = stream.getvalue() if row else b"poison"  # one sample of each shard is left out
    return RawRecord(f"{shard:05d}{row:04d}", data, "png", f"picture {shard} {row}")


def _start(processes: ForkServerContext, root: Path, tokens: Path, action: str) -> ForkServerProcess:
    process = processes.Process(target=work, args=(str(root), str(tokens), action), daemon=True)
    process.start()
    return process


def _finish(processes: ForkServerContext, root: Path, tokens: Path) -> None:
    process = _start(processes, root, tokens, "all")
    process.join(120)
    assert process.exitcode == 0


def _contents(tokens: Path) -> dict[str, bytes]:
    kept = [*tokens.glob("*"), *tokens.glob("plan/*"), *tokens.glob("quarantine/*")]
    return {
        str(path.relative_to(tokens)): path.read_bytes() for path in kept if path.is_file() and path.stem != "stats"
    }


def _kill_somebody_at_work(tokens: Path, chance: random.Random, deadline: float) -> bool:
    """SIGKILL a process that has a shard half written; False when all work is done first."""
    while time.monotonic() < deadline:
        partial = list(tokens.glob(".tokens-*.partial"))
        if partial:
            time.sleep(chance.uniform(0, 0.08))
            # .tokens-000000.tar.<host>-<pid>-<random>.partial
            pid = int(chance.choice(partial).name.removesuffix(".partial").split("-")[-2])
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            return True
        if len(list(tokens.glob("tokens-*.json"))) == UNITS:
            return False
        time.sleep(0.002)
    raise AssertionError("nobody works, and the work is not done")


def _round(processes: ForkServerContext, root: Path, number: int) -> int:
    """Kill workers and start new ones, then let the work be finished; returns how many were killed at work."""
    tokens, chance = root / f"round-{number}", random.Random(number)
    deadline = time.monotonic() + 120
    workers = [_start(processes, root, tokens, "run") for _ in range(WORKERS)]
    kills = 0
    try:
        while kills < KILLS and _kill_somebody_at_work(tokens, chance, deadline):
            kills += 1
            workers.append(_start(processes, root, tokens, "run"))
        _finish(processes, root, tokens)  # begins while others are still at work
    finally:
        for worker in workers:
            worker.join(60)
            worker.kill()
            worker.join()
    assert _contents(tokens) == _contents(root / "undisturbed")
    left = [*tokens.rglob(".*.partial"), *(tokens / "leases").glob("[0-9]*"), *(tokens / "workers").iterdir()]
    assert not left
    return kills


def test_killed_workers_lose_nothing_and_count_nothing_twice(processes, root):
    assert _round(processes, root, 0) >= 2


@pytest.mark.long
def test_killed_workers_lose_nothing_and_count_nothing_twice_in_twenty_rounds(processes, root):
    assert sum(_round(processes, root, number) for number in range(1, 21)) >= 40


def test_a_request_to_stop_keeps_what_is_finished(processes, root):
    tokens = root / "stopped"
    worker = _start(processes, root, tokens, "run")
    deadline = time.monotonic() + 60
    while not list(tokens.glob("tokens-*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGUSR1)
    worker.join(60)
    assert worker.exitcode == 1  # StopRequested; the command line turns it into 75
    assert 0 < len(list(tokens.glob("tokens-*.json"))) < UNITS and not list((tokens / "leases").glob("[0-9]*"))
    assert not list(tokens.glob(".*.partial"))
    _finish(processes, root, tokens)
    assert _contents(tokens) == _contents(root / "undisturbed")
