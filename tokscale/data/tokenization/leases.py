"""Who works on what, without a server: files that only one process can create, and a heartbeat.

A lease keeps workers from doing the same work twice; nothing depends on it for correctness, since committing a unit
is atomic. A worker is dead when its process is gone from this machine, or when its heartbeat is old by the file
system's own clock.

A unit's first lease is the file `000012`. Whoever follows a dead worker creates the next one, `000012.1`, and so on:
the last file tells who has the unit, and an empty one that it was given back. No file of such a row is moved or removed
while anybody works, so however late a worker acts on what it read, only one can create the file that follows it.
"""

import itertools
import json
import math
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokscale.base.errors import DataError, StorageError
from tokscale.base.files import read_json, row_of, write_json
from tokscale.base.text import lines_of

_LEASE, _WORKER = re.compile(r"(\d{6,})(\.\d+)?"), re.compile(r"\.?.+-\d+-[0-9a-f]{8}\.(json|lease)")
"""Names of ours. Nothing else is removed: the folders may be links to where others keep things, too."""


@dataclass(frozen=True)
class WorkerId:
    """One process, told apart from every other one before and after it."""

    name: str
    host: str
    machine: str
    """Boot and process namespace: where `pid` means something."""
    pid: int
    started: str
    """The process's start time in clock ticks: pids come again."""

    @classmethod
    def own(cls) -> "WorkerId":
        """This process."""
        host, pid = socket.gethostname(), os.getpid()
        return cls(f"{host}-{pid}-{uuid.uuid4().hex[:8]}", host, _machine(), pid, _started(pid))


class Leases:
    """This worker's view of the leases of a folder. Use as a context, inside of which it gives heartbeats."""

    def __init__(self, folder: Path, expire_seconds: float):
        """Prepare; nothing is written before the context is entered.

        Args:
            folder: Of token shards.
            expire_seconds: A worker on another machine without a heartbeat for so long is dead.
        """
        self.worker = WorkerId.own()
        self._leases, self._workers = folder / "leases", folder / "workers"
        self._expire = expire_seconds
        self._heartbeat_file = self._workers / f"{self.worker.name}.json"
        self._ready, self._prepared = self._workers / f".{self.worker.name}.lease", False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.tries = 0
        """How often this worker has written to take a unit."""

    def __enter__(self) -> "Leases":
        self._leases.mkdir(parents=True, exist_ok=True)
        self._touch_heartbeat()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Be no worker any more."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._heartbeat_file.unlink(missing_ok=True)
        self._ready.unlink(missing_ok=True)

    def claim(self, unit: int, done: Callable[[], bool] = lambda: False) -> str | None:
        """Try to take a unit. Reads first, so that a unit which somebody has costs no writing.

        Args:
            unit: Its number.
            done: Whether there is nothing to do; asked about a unit that was taken before, which may be why it is free.

        Returns:
            `"new"`, `"taken over"` when its worker died, or None when somebody alive has it, or it is done.
        """
        self._prepare()  # before the look, so that little time passes between it and the taking
        last, owner = self._last(unit)
        if last is None:
            return "new" if self._create(self._path(unit, 0)) else None
        if (owner and self.alive(owner)) or done():
            return None
        if not self._create(self._path(unit, last + 1)):
            return None
        if not owner:
            return "new"
        (self._workers / f"{owner}.json").unlink(missing_ok=True)
        return "taken over"

    def release(self, unit: int) -> None:
        """Give a unit back, done or not."""
        last, owner = self._last(unit)
        if last is not None and owner == self.worker.name:
            with suppress(FileNotFoundError):  # cleared by somebody who thought this worker dead
                os.truncate(self._path(unit, last), 0)

    @contextmanager
    def held(self, unit: int) -> Iterator[None]:
        """Release the unit at the end, however it comes."""
        try:
            yield
        finally:
            self.release(unit)

    def owner(self, unit: int) -> str | None:
        """Name of the worker that has a unit, None when nobody does."""
        return self._last(unit)[1] or None

    def alive(self, worker: str) -> bool:
        """Whether a worker still works."""
        path = self._workers / f"{worker}.json"
        try:
            seen, other = path.stat().st_mtime, WorkerId(**read_json(path))
        except (OSError, DataError, TypeError):  # it removed its heartbeat, or never finished writing it
            return False
        if other.machine == self.worker.machine and other.started:
            return _started(other.pid) == other.started
        # The file system's clock, not this machine's: they may differ by minutes.
        now = self._touch_heartbeat()
        if self._thread is None:  # who only looks is no worker
            self._heartbeat_file.unlink(missing_ok=True)
        return now - seen < self._expire

    def active(self) -> dict[int, str]:
        """Units that are being worked on, by whom. Opens a file for each unit that was ever taken: for who looks."""
        owned = {unit: self.owner(unit) for unit in self.taken()}
        return {unit: owner for unit, owner in sorted(owned.items()) if owner and self.alive(owner)}

    def taken(self) -> set[int]:
        """Units that somebody has or had since the last `clear`; one look into the folder."""
        if not self._leases.exists():
            return set()
        return {int(found[1]) for name in os.listdir(self._leases) if (found := _LEASE.fullmatch(name))}

    def others(self) -> bool:
        """Whether any other worker is alive. Looks no further than the first."""
        names = (path.stem for path in self._workers.glob("*.json"))
        return any(name != self.worker.name and self.alive(name) for name in names)

    def forget_dead(self) -> None:
        """Take down the signs of workers that did not do so themselves."""
        for path in self._workers.glob("*.json"):
            if _WORKER.fullmatch(path.name) and not self.alive(path.stem):
                path.unlink(missing_ok=True)
                path.with_name(f".{path.stem}.lease").unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what is left of given back and of dead workers' leases; when nobody works."""
        for path in self._leases.glob("[0-9]*"):
            if _LEASE.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _path(self, unit: int, follower: int) -> Path:
        return self._leases / (f"{unit:06d}.{follower}" if follower else f"{unit:06d}")

    def _last(self, unit: int) -> tuple[int | None, str]:
        """The last lease of a unit and its worker's name, empty when it was given back; None when there is none."""
        last, owner = None, ""
        with suppress(FileNotFoundError):
            for follower in itertools.count():
                owner = self._path(unit, follower).read_text()
                last = follower
        return last, owner

    def _prepare(self) -> None:
        # Content and name must appear together, so a finished file is linked to its name.
        if not self._prepared:
            self._ready.write_text(self.worker.name)
            self._prepared = True

    def _create(self, path: Path) -> bool:
        self.tries += 1
        try:
            os.link(self._ready, path)
        except FileExistsError:
            # Or it was made by us: a file server that loses its answer is asked again, and then it is there.
            if self._ready.stat().st_nlink == 1:
                return False
        self._ready.unlink(missing_ok=True)  # the next lease is another file: giving this one back empties it
        self._prepared = False
        return True

    def _touch_heartbeat(self) -> float:
        """Give a heartbeat; when, by the file system's clock."""
        while True:
            try:
                os.utime(self._heartbeat_file)
                return self._heartbeat_file.stat().st_mtime
            except FileNotFoundError:  # somebody thought this worker dead
                write_json(self._heartbeat_file, asdict(self.worker))

    def _beat(self) -> None:
        while not self._over.wait(self._expire / 8):
            with suppress(OSError, StorageError):  # a moment of trouble must not make this worker a dead one
                self._touch_heartbeat()


class Attempts:
    """What went wrong with each unit, and when to stop trying."""

    def __init__(self, folder: Path, max_attempts: int, max_deaths: int, max_drop_fraction: float = 0.0):
        """Look after the folder.

        Args:
            folder: Of token shards.
            max_attempts: Failures after which a unit has failed for good.
            max_deaths: Workers that may die over a unit before it has failed for good: an image may crash a decoder.
            max_drop_fraction: A unit that lost more of its samples has failed for good, until more are allowed.
        """
        self._folder = folder / "attempts"
        self._limits = {"refused": 1, "failed": max_attempts, "died": max_deaths}
        self._most_drops = max_drop_fraction

    def add(self, unit: int, kind: str, message: str, worker: WorkerId, **facts: Any) -> None:
        """Record what became of a unit.

        Args:
            unit: Its number.
            kind: `failed` in a way that may pass, `refused` for what would happen again, `drops` with the share of
                its samples that were left out as `share`, or `died` for its worker.
            message: What happened.
            worker: Who noticed.
            facts: What else to keep; `inputs` says of which files it is true.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        entry = {"kind": kind, "message": message, "worker": worker.name, "time": time.strftime("%FT%T%z")} | facts
        with open(self._folder / f"{unit:06d}.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def of(self, unit: int) -> list[dict[str, Any]]:
        """All records of a unit, oldest first."""
        try:
            lines = lines_of((self._folder / f"{unit:06d}.jsonl").read_text(errors="replace"))
        except FileNotFoundError:
            return []
        entries = (row_of(line, "kind", "message") for line in lines)
        return [entry for entry in entries if entry is not None]

    def failed_for_good(self, unit: int, inputs: str = "") -> str | None:
        """Why a unit is not tried any more and what helps, None while it is tried.

        Args:
            unit: Its number.
            inputs: What its input files are now; what happened with others is forgotten.
        """
        entries = [entry for entry in self.of(unit) if not inputs or entry.get("inputs", inputs) == inputs]
        drops = [entry for entry in entries if entry["kind"] == "drops"]
        if drops and drops[-1]["share"] > self._most_drops:
            enough = math.ceil(drops[-1]["share"] * 10_000) / 10_000
            return (
                f"{drops[-1]['message']}. Mend the inputs, or take it as it is by work.max_drop_fraction={enough:g} "
                f"(now {self._most_drops:g})"
            )
        for kind, limit in self._limits.items():
            found = [entry for entry in entries if entry["kind"] == kind]
            if len(found) >= limit:
                times = f"{kind} {len(found)} times, last: " if limit > 1 else ""
                return f"{times}{found[-1]['message']}. When that is mended, retry_failed=true tries again"
        return None

    def clear(self, unit: int) -> None:
        """Forget, and so try again."""
        (self._folder / f"{unit:06d}.jsonl").unlink(missing_ok=True)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode()}"


def _started(pid: int) -> str:
    """When a process of this machine started; empty when there is none, or no way to know."""
    try:
        # The second field is the program's name in parentheses, and may contain anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
