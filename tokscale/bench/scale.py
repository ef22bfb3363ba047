"""`bench scale`: what grows with the ranks: calls on the file system, messages and sockets of real processes, counted.

    tokscale bench scale worlds=[2,4,8,16,32,64] out=scale.json figure=scale.png

Each part of a start runs in so many forked processes, which count what they open, look at and send; a tokenization runs
with so many workers. The law count = a * ranks^b is fitted to the largest count of any rank but the first, and to that
of the first, which looks for all: over the numbers of ranks at which the tree of control messages has an inner rank,
since below them a rank gains a child with each rank there is. `ours` is b, `baseline` is 1: what grew with the ranks
before.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt

from tokscale.base.config import Config, PathKey
from tokscale.base.log import logger
from tokscale.base.state import TensorShard
from tokscale.bench.file_calls import count_file_calls
from tokscale.bench.measure import row
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.store import CheckpointStore
from tokscale.data.tokenization.leases import Leases
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.dist.tree import FANOUT
from tokscale.train.preflight import PreflightConfig, preflight
from tokscale.train.watchdog import Watchdog, WatchdogConfig

log = logger("bench")
COUNTS = ("opens", "stats", "writes", "messages", "bytes", "peers", "sockets", "hops")
_FLAT = 0.05
"""Exponents below it are noise of a share that is one more or one less."""


class ScaleBench(Config):
    """What `bench scale` is asked."""

    worlds: tuple[PositiveInt, ...] = (2, 4, 8, 16, 32, 40, 48, 56, 64)
    """Numbers of processes."""
    checkpoints: int = Field(default=3, ge=1)
    """That are kept when the run is taken up."""
    units: int = Field(default=200, ge=1)
    """Of the tokenization."""
    figure: PathKey | None = None
    """Where the laws are drawn, as a PNG; needs matplotlib."""


CONFIG = ScaleBench
Counted = dict[str, float]


def rows(config: ScaleBench) -> Iterator[dict[str, Any]]:
    """Count, fit and draw."""
    parts: dict[str, Callable[[Comm, Path, ScaleBench], Counted]] = {
        "resume": resume,
        "preflight": look_first,
        "heartbeats": heartbeats,
        "message": message,
        "tokenize": claims,
    }
    found: dict[str, dict[int, list[Counted]]] = {}
    for part, function in parts.items():
        for world in config.worlds:
            with tempfile.TemporaryDirectory() as folder:
                ranks = run_ranks(function, world, Path(folder), config, fork=True, timeout=900.0)
            found.setdefault(part, {})[world] = ranks
            log.info("%s, %d ranks: first %s, largest of the others %s", part, world, ranks[0], _largest(ranks[1:]))
    for part, worlds in found.items():
        for name in COUNTS:
            for who, of in (("others", lambda ranks: _largest(ranks[1:])), ("first", lambda ranks: ranks[0])):
                points = {world: of(ranks).get(name, 0.0) for world, ranks in worlds.items() if len(ranks) > 1}
                if any(points.values()):
                    yield _row(part, who, name, points)
    for world, ranks in found["tokenize"].items():
        tries = sum(rank["tries"] for rank in ranks) / config.units
        yield row(f"scale/tokenize/{world}-workers/tries-for-a-unit", tries, 1.0, "tries", 1 / 1.2)
    if config.figure is not None:
        draw(found, config.figure)


def law(points: Mapping[int, float]) -> tuple[float, float]:
    """The least-squares fit of log(count) = log(a) + b log(ranks): a and b; a count of 0 enters as 1."""
    xs, ys = [math.log(world) for world in points], [math.log(max(count, 1.0)) for count in points.values()]
    middle_x, middle_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - middle_x) ** 2 for x in xs)
    b = sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True)) / spread if spread else 0.0
    return math.exp(middle_y - b * middle_x), b


def _row(part: str, who: str, name: str, points: Mapping[int, float]) -> dict[str, Any]:
    # From here on there is a rank with a parent and all its children: one that sends the most that any will.
    beyond = {world: count for world, count in points.items() if world > 2 * FANOUT}
    a, b = law(beyond if len(beyond) > 1 else points)
    entry = {
        "name": f"scale/{part}/{who}/{name}",
        "ours": b if b > _FLAT else 0.0,
        "baseline": 1.0,
        "unit": "exponent",
        "ratio": 1.0 / max(b, _FLAT),
        "target": None,
    }
    return entry | {"a": a, "counts": dict(points), "at_2048": a * 2048**b if b > _FLAT else max(points.values())}


def _largest(ranks: Sequence[Counted]) -> Counted:
    return {name: max(rank.get(name, 0.0) for rank in ranks) for name in COUNTS} if ranks else {}


def _counted(comm: Comm, folder: Path, do: Callable[[], object]) -> Counted:
    before = comm.traffic.as_dict()
    began = time.perf_counter()
    with count_file_calls(folder) as calls:
        do()
    after = comm.traffic.as_dict()
    sent = {name: float(after[name] - before[name]) for name in ("messages", "bytes")}
    depth = math.ceil(math.log(comm.world * 15 + 1, 16)) - 1 if comm.world > 1 else 0
    seen: Counted = {"peers": float(after["peers"]), "sockets": float(_sockets()), "hops": 2.0 * depth}
    return {
        **{name: float(count) for name, count in calls.items()},
        **sent,
        **seen,
        "seconds": time.perf_counter() - began,
    }


def _sockets() -> int:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.path.lexists(link) and os.readlink(link).startswith("socket:") for link in links)


class _Shards:
    """A rank's share of one tensor, as an engine gives it."""

    replicated = False

    def __init__(self, comm: Comm):
        self._comm, self._data = comm, torch.zeros(16)

    def shards(self) -> Iterator[TensorShard]:
        yield TensorShard("weight", "weight", (16 * self._comm.world,), 16 * self._comm.rank, self._data)

    def scalars(self) -> Mapping[str, Any]:
        return {}

    def load(self, source: Any) -> None:
        start = 16 * self._comm.rank
        self._data.copy_(source.read("weight", "weight", start, start + 16))


def resume(comm: Comm, folder: Path, config: ScaleBench) -> Counted:
    """Save some checkpoints, then take the newest up as a new start does."""
    engines: Any = {"model": _Shards(comm)}
    kept = CheckpointConfig(keep_last=config.checkpoints + 1, async_save=False)
    store = CheckpointStore(folder / "checkpoints", kept, comm)
    for step in range(1, config.checkpoints + 1):
        store.save(step, engines, {})

    def load(checkpoint: Any) -> None:
        with checkpoint.source("model") as source:
            engines["model"].load(source)

    def again() -> None:
        fresh = CheckpointStore(folder / "checkpoints", kept, comm)
        assert not fresh.empty() and fresh.resume(engines, load) is not None

    return _counted(comm, folder, again)


def look_first(comm: Comm, folder: Path, config: ScaleBench) -> Counted:
    """Preflight, as on a machine of so many ranks."""
    del config
    comm.on_main("making a file", lambda: (folder / "data.tar").write_bytes(b"x"))
    look = PreflightConfig(when="always", min_free_gib=0, transfer_mib=0.01, files_per_rank=1)
    files = [folder / "data.tar"] * comm.world
    return _counted(comm, folder, lambda: preflight(look, comm, folder=folder, files=lambda: files, settings={}))


def heartbeats(comm: Comm, folder: Path, config: ScaleBench) -> Counted:
    """Two seconds of heartbeats into the run folder, ten a second."""
    del config

    def beat() -> None:
        with Watchdog(WatchdogConfig(heartbeat_seconds=0.1), comm, folder) as watchdog:
            watchdog.beat("step", 1)
            time.sleep(2.0)
            comm.barrier()

    return _counted(comm, folder / "heartbeats", beat)


def message(comm: Comm, folder: Path, config: ScaleBench) -> Counted:
    """One control message to all ranks and back."""
    del config
    comm.barrier()
    return _counted(comm, folder, lambda: comm.max(1.0))


def claims(comm: Comm, folder: Path, config: ScaleBench) -> Counted:
    """Workers that share the units of a tokenization: what one unit costs, and leaving."""
    with Leases(folder, 600) as leases:
        comm.barrier()

        def work() -> None:
            order = torch.randperm(config.units, generator=torch.Generator().manual_seed(comm.rank)).tolist()
            while True:
                taken = leases.taken()  # one look for each unit made, as the stage does
                unit = next((unit for unit in order if unit not in taken), None)
                if unit is None:
                    break
                if leases.claim(unit) is not None:
                    time.sleep(0.02)
                    leases.release(unit)
            leases.leave()
            leases.others()

        return _counted(comm, folder, work) | {"tries": float(leases.tries)}


def draw(found: Mapping[str, Mapping[int, Sequence[Counted]]], path: Path) -> None:
    """Counts of the rank that has most, over the number of ranks, with the line of what grows with it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(found), 3.4))
    for number, (part, worlds) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(1, len(found), number)
        for name in ("opens", "stats", "writes", "messages", "sockets"):
            points = {world: _largest(ranks[1:]).get(name, 0.0) for world, ranks in worlds.items() if len(ranks) > 1}
            if any(points.values()):
                axes.plot(list(points), [max(count, 0.5) for count in points.values()], marker="o", label=name)
        many = sorted(world for world in worlds if world > 1)
        axes.plot(many, many, color="grey", linestyle=":", label="grows with ranks")
        axes.set(
            xscale="log", yscale="log", title=part, xlabel="ranks", ylabel="calls of one rank" if number == 1 else ""
        )
        axes.set_xticks(many, [str(world) for world in many])
        axes.minorticks_off()
        axes.legend(fontsize=6)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
