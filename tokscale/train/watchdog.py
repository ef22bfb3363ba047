"""Sees that a run has stopped moving, says which rank the others wait for, and ends it with exit code 76.

Every rank has a thread that gives a heartbeat (phase, step): on its own machine, where one rank collects those of the
node into one file of the run folder, so that a shared file system has a few writers and not a few thousand. When one
rank stays in a phase for longer than it may, all ranks write the Python stacks of all their threads, the heartbeats are
compared, and the processes end: a collective that waits for a rank that is gone would otherwise wait for an hour, in
silence.
"""

import faulthandler
import json
import math
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from pydantic import Field

from tokscale.base.config import Config
from tokscale.base.errors import DataError, StalledError
from tokscale.base.files import read_regular
from tokscale.base.log import logger
from tokscale.dist.comm import Comm
from tokscale.dist.slurm import node_name

log = logger("watchdog")

PHASES = ("start", "first data", "measure", "report", "hooks", "save", "step", "data", "exchange", "end")
"""In the order in which a rank with a given number of finished steps goes through them."""
FOLDER, MARKER = "heartbeats", "STALLED"
_UNHEARD = 3
"""Heartbeats after which a rank looks into the run folder itself: the one that looks for its node may be dead."""


class WatchdogConfig(Config):
    """How long nothing may happen."""

    enabled: bool = True
    """Whether to watch at all."""
    step_seconds: float = Field(default=900.0, gt=0)
    """Longest that waiting for data, computing a step or the exchange after it may take."""
    long_seconds: float = Field(default=3600.0, gt=0)
    """Longest that the first step (which compiles), saving and hooks may take."""
    heartbeat_seconds: float = Field(default=10.0, gt=0)
    """Between heartbeats. A rank without one for three times as long is silent: stopped, or its machine is gone."""
    grace_seconds: float = Field(default=20.0, gt=0)
    """How long the ranks of a stalled run may take to write their stacks."""


@dataclass(frozen=True)
class Heartbeat:
    """Where one rank is."""

    rank: int
    node: str
    pid: int
    phase: str
    step: int
    """Steps finished."""
    seconds: float
    """For how long it has been in the phase."""
    dumped: bool = False
    """Whether its stacks are written."""

    @property
    def place(self) -> tuple[int, int]:
        """Later in the run is larger."""
        return self.step, PHASES.index(self.phase)


class Watchdog(AbstractContextManager["Watchdog"]):
    """Watches one rank of a run inside its context."""

    def __init__(
        self,
        config: WatchdogConfig,
        comm: Comm,
        run_dir: Path,
        on_stall: Callable[[StalledError], None] = lambda error: None,
    ):
        """Prepare to watch.

        Args:
            config: Limits.
            comm: The ranks of the run.
            run_dir: Gets `heartbeats/node_0000.json`, on a stall one file for each rank beside it, and
                `logs/stacks_rank_0000.txt`.
            on_stall: Told before the process ends with 76, on every rank that can still speak.
        """
        self._config, self._comm, self._on_stall = config, comm, on_stall
        self._folder, self._logs = run_dir / FOLDER, run_dir / "logs"
        self._near = self._folder
        """On this machine."""
        self._looks = 0
        self._now = ("start", 0, time.monotonic())
        self._first: int | None = None
        self._done = threading.Event()
        self._dumped = False
        self._stacks: IO[str] | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        """Start. Collective, so that no rank reads what an earlier start has left."""
        if not self._config.enabled:
            return self
        name = self._comm.on_main(f"clearing {self._folder}", self._clear)
        self._near = Path(tempfile.gettempdir(), f"tokscale-heartbeats-{name}")
        self._near.mkdir(exist_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        # Kept open: faulthandler writes to its descriptor when nothing of Python runs any more.
        self._stacks = open(stacks_path(self._logs, self._comm.rank), "a")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stacks is None:
            return
        self.beat("end", self._now[1])
        self._done.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()
        if self._speaks:
            shutil.rmtree(self._near, ignore_errors=True)

    def _clear(self) -> str:
        """Remove what an earlier start has left; a name for this one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for file in self._folder.iterdir():
            file.unlink(missing_ok=True)
        return secrets.token_hex(8)

    @property
    def _speaks(self) -> bool:
        """Whether this rank writes and looks into the run folder for its node."""
        return self._comm.env.local_rank == 0

    def beat(self, phase: str, step: int) -> None:
        """This rank enters `phase` with `step` steps finished. Costs nothing."""
        if self._first is None and phase == "step":
            self._first = step
        self._now = (phase, step, time.monotonic())

    def _watch(self) -> None:
        poll = min(1.0, self._config.heartbeat_seconds / 2)
        written = time.monotonic()
        while not self._done.wait(poll):
            # The backstop for a thread that holds the interpreter lock: ours cannot run then, but a timer in C can.
            faulthandler.dump_traceback_later(self._limit() + 10 * poll, file=self._stacks or 2)
            if time.monotonic() - written >= self._config.heartbeat_seconds:
                self._write()
                written = time.monotonic()
            phase, _, since = self._now
            if phase != "end" and time.monotonic() - since > self._limit():
                (self._near / MARKER).touch()
                (self._folder / MARKER).touch()
            if self._is_stalled(every=math.ceil(_UNHEARD * self._config.heartbeat_seconds / poll)):
                self._end()

    def _is_stalled(self, every: int) -> bool:
        """Whether some rank has called for the end. Whoever does not speak for the node looks far away seldom."""
        self._looks += 1
        called = (self._near / MARKER).exists()
        if not called and (self._speaks or self._looks % every == 0) and (self._folder / MARKER).exists():
            called = True
            (self._near / MARKER).touch()
        return called and not self._done.is_set()

    def _limit(self) -> float:
        phase, step, _ = self._now
        usual = phase in ("data", "step", "exchange") and step != self._first
        return self._config.step_seconds if usual else self._config.long_seconds

    def _end(self) -> None:
        """Dump, wait for the others to dump, compare, and leave."""
        assert self._stacks is not None
        self._stacks.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._comm.rank}: {self._now[:2]}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        if self._comm.device.type == "cuda":
            _dump_flight_recorder(self._logs / f"flight_rank_{self._comm.rank:04d}")
        self._dumped = True
        self._give(self._folder / f"rank_{self._comm.rank:04d}.json", [self._own()])
        beats = self._others(time.monotonic() + self._config.grace_seconds)
        error = StalledError(f"{describe_stall(beats)}; every rank's stacks are in {self._logs}/stacks_rank_*.txt")
        log.error("%s", error)
        try:
            self._on_stall(error)
        finally:
            os._exit(StalledError.exit_code)

    def _others(self, deadline: float) -> list[Heartbeat | None]:
        """Everyone's last heartbeat, waiting until all have dumped; None for who is silent."""
        while True:
            beats = read_heartbeats(self._folder, self._comm.world)
            if all(beat is not None and beat.dumped for beat in beats) or time.monotonic() >= deadline:
                return [beat if beat is not None and beat.dumped else None for beat in beats]
            time.sleep(0.1)

    def _own(self) -> Heartbeat:
        phase, step, since = self._now
        seconds = round(time.monotonic() - since, 1)
        return Heartbeat(self._comm.rank, node_name(), os.getpid(), phase, step, seconds, self._dumped)

    def _write(self) -> None:
        self._give(self._near / f"rank_{self._comm.rank:04d}.json", [self._own()])
        if self._speaks:
            beats = sorted(_read(self._near).values(), key=lambda beat: beat.rank)
            self._give(self._folder / f"node_{self._comm.env.node:04d}.json", beats)

    def _give(self, path: Path, beats: Sequence[Heartbeat]) -> None:
        partial = path.with_suffix(".partial")
        try:  # whole or not there, but not durable: it is of use only while it is new
            partial.write_text(json.dumps([asdict(beat) for beat in beats]))
            os.replace(partial, path)
        except OSError as error:
            log.warning("%s: no heartbeat: %s", path, error)


def stacks_path(logs: Path, rank: int) -> Path:
    """Where a rank's stacks are written, on a stall and on SIGUSR2."""
    return logs / f"stacks_rank_{rank:04d}.txt"


def read_heartbeats(folder: Path, world: int) -> list[Heartbeat | None]:
    """The last heartbeat of every rank; None where there is none yet."""
    found = _read(folder)
    return [found.get(rank) for rank in range(world)]


def _read(folder: Path) -> dict[int, Heartbeat]:
    found: dict[int, Heartbeat] = {}
    for path in sorted(folder.glob("*.json")):  # what a node says first, then what its ranks say on a stall
        with suppress(OSError, DataError, ValueError, TypeError, KeyError):
            found |= {beat["rank"]: Heartbeat(**beat) for beat in json.loads(read_regular(path))}
    return found


def describe_stall(beats: Sequence[Heartbeat | None]) -> str:
    """Which rank the others wait for: the silent ones, or those that are furthest behind."""
    alive = [beat for beat in beats if beat is not None]
    silent = [rank for rank, beat in enumerate(beats) if beat is None]
    if silent:
        seen = f"; the others are in {_places(alive)}" if alive else ""
        return f"stalled: no heartbeat of rank {_ranks(silent)}{seen}"
    behind = min(beat.place for beat in alive)
    late = [beat for beat in alive if beat.place == behind]
    if len(late) == len(alive):
        return f"stalled: every rank is in {_places(late)} for {max(beat.seconds for beat in late):.0f} s"
    first = late[0]
    return (
        f"stalled: late is rank {_ranks([beat.rank for beat in late])} ({first.node}, process {first.pid}), in "
        f"{_places(late)} for {first.seconds:.0f} s; the others are in {_places([b for b in alive if b not in late])}"
    )


def _places(beats: Sequence[Heartbeat]) -> str:
    found = sorted({(beat.place, f"phase {beat.phase} after step {beat.step}") for beat in beats})
    return " and ".join(words for _, words in found[:3])


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _dump_flight_recorder(path: Path) -> None:
    """The last collectives of NCCL, for `python -m torch.distributed.flight_recorder.fr_trace`."""
    from torch._C import _distributed_c10d  # private, and only built with NCCL

    dump = getattr(_distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None:
        try:
            path.write_bytes(dump())
        except (OSError, RuntimeError) as error:
            log.warning("%s: no flight recorder: %s", path, error)
