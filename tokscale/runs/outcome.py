"""How the stages of a run folder ended, kept by stage and attempt.

Launchers swallow exit codes, several stages share one run folder, and a batch script has to decide whether its job
comes again. So each start of a stage, an attempt, has a record of its own from its beginning on, and beside it a line
for hosts without Python; `README.md` beside this file describes both. `exit.json` repeats the record that ended last.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokscale.base.errors import (
    DataError,
    PeerLostError,
    StalledError,
    StopRequested,
    StorageError,
    TokscaleError,
)
from tokscale.base.files import atomic_write, may_write, read_json, read_regular, write_json
from tokscale.base.log import logger
from tokscale.dist.env import ProcessEnv, launch_name
from tokscale.dist.slurm import OUTCOME, NodesRefusedError, job_name, restarts
from tokscale.runs.clock import StageClock, time_spent
from tokscale.runs.process import is_alive, is_own, other_launch, owner, same_launch
from tokscale.runs.stage import StageResult

EXIT_FILE, FOLDER = "exit.json", "outcomes"
ATTEMPT = "TOKSCALE_ATTEMPT"
"""Environment variable by which a batch script names the attempt itself."""
_REFUSED = "refused"
log = logger("stages")


class RunFolderRefused(TokscaleError):  # noqa: N818 - reads as what happened
    """The run folder belongs to someone else, so nothing may be changed there but the record of our own attempt."""


def record_folder(run_dir: Path, out: Path | None) -> Path:
    """Where a start is recorded: in the run folder, or beside `out` when the run folder may only be read.

    Args:
        run_dir: As given; whose results are read may be somebody else's.
        out: What the stage makes outside the run folder, a file or a folder; None when it makes nothing there.
    """
    if out is None or may_write(run_dir) or not may_write(out):
        return run_dir
    out = Path(os.path.abspath(out))
    return out.with_name(f"{out.name}.run")


class Attempt:
    """One start of a stage in a run folder; all ranks of the start share it."""

    def __init__(self, run_dir: Path, stage: str, env: ProcessEnv):
        """Nothing is read or written yet."""
        self.run_dir, self.stage, self.env = Path(run_dir), stage, env
        self.name = attempt_name(env)
        self.is_kept = may_write(self.run_dir)
        self._before: bytes | None = None

    @property
    def path(self) -> Path:
        """The record."""
        return self.run_dir / FOLDER / self.stage / f"{self.name}.json"

    def begin(self) -> None:
        """Take away how an earlier process ended, so that one that is killed leaves nothing that looks like success.

        By the main rank, before the stage runs. A run folder that is not there is not made, and one that may only be
        read is left as it is: a stage that has to write there says so itself.
        """
        path = self.run_dir / EXIT_FILE
        if not self.is_kept:
            log.info("%s: may only be read, so how this stage ends is not kept there", self.run_dir)
            return
        with suppress(OSError, DataError):  # none is there, or another job that begins is taking it away
            self._before = read_regular(path)
        try:
            path.unlink(missing_ok=True)
            self.mark()
        except (OSError, StorageError) as error:
            log.info("%s: how this stage ends will not be kept there (%s)", self.run_dir, error)

    def mark(self) -> None:
        """Leave the record of an attempt that has begun, if the run folder stands and holds none of this start yet."""
        if not (self.is_kept and self.run_dir.is_dir()) or self._marked():
            return
        known = _read(self.path)
        if known is not None:
            if known["code"] and known.get("rank") and same_launch(known):
                return  # another rank has failed before the main rank came so far
            if known["code"] is None and is_alive(known, self.path):
                self.name = self._free_name()  # two processes of one job, side by side
            else:
                _write_record(self.path.with_name(f"{(name := self._free_name())}.json"), known | {"attempt": name})
        number = 1 + max((int(other.get("number", 0)) for other in self._others()), default=0)
        self._write({"number": number, "began": _now(), "code": None, "again": None, "message": "", **owner()})

    def succeed(self, result: StageResult, *, seconds: float | None = None, clock: StageClock | None = None) -> None:
        """Keep a good end, and the stage's metrics in `stages/<stage>.json`. By the main rank.

        `exit.json` is left away while another attempt runs here: were that one killed, it would look like success.

        Args:
            result: How the stage ended.
            clock: Of this process; the seconds are those of all processes, interrupted ones included.
            seconds: Taken instead, without a clock.
        """
        if self.is_kept:
            self._end(0, again=False, message=result.summary)
            self._keep_metrics(result, seconds, clock)

    def fail(self, code: int, error: BaseException, *, create: bool = False) -> None:
        """Keep a bad end. By any rank; the first failure stays, unless it only followed from another rank's.

        A success does not stay: the main rank may have ended well before another rank failed.

        Args:
            code: The exit code.
            error: Why.
            create: Make the run folder when it is missing.
        """
        if not (self.is_kept and (create or self.run_dir.is_dir())):
            return
        known = _read(self.path)
        if known is not None and known["code"] and not known.get("follows") and not other_launch(known):
            return
        refused = {_REFUSED: True} if isinstance(error, RunFolderRefused) else {}
        more: dict[str, Any] = {"follows": True} if isinstance(error, PeerLostError) else {}
        nodes = error.nodes if isinstance(error, NodesRefusedError) else getattr(error, "exclude", ())
        if nodes:
            more["exclude"] = list(nodes)
        try:
            self._end(code, again=comes_again(error), message=_words(error), **refused, **more)
        except (OSError, TokscaleError) as problem:  # the disk may be what failed
            log.warning("%s could not be written: %s", self.path, problem)

    def refused(self, error: BaseException, *, give_back: bool) -> None:
        """The run folder turned out to be somebody else's: nothing is changed there but our own record.

        Args:
            error: Why.
            give_back: Whether to put back the `exit.json` that `begin` took; not where somebody works, whose own end
                must not find it.
        """
        self.fail(getattr(error, "exit_code", 1), error)
        if give_back and self._before is not None:
            with suppress(OSError, StorageError), atomic_write(self.run_dir / EXIT_FILE) as file:
                file.write(self._before)

    def _end(self, code: int, *, again: bool, message: str, **more: Any) -> None:
        known = _read(self.path) or {}
        began = {key: known[key] for key in ("number", "began") if key in known}
        record = {**began, "code": code, "again": again, "message": message, "time": _now(), **owner(), **more}
        self._write(record)
        if more.get(_REFUSED):
            return
        left = _read(self.run_dir / EXIT_FILE)
        same = left is not None and left.get("attempt") == self.name and left["stage"] == self.stage
        if code and same and left is not None and left["code"] and not left.get("follows"):
            return
        if code or not any(self._running_beside()):
            write_json(self.run_dir / EXIT_FILE, self._full(record))

    def _keep_metrics(self, result: StageResult, seconds: float | None, clock: StageClock | None) -> None:
        path = self.run_dir / "stages" / f"{self.stage}.json"
        if result.skipped and path.exists():
            if clock is not None:
                clock.forget()
            return  # the metrics of the run that did the work are the ones worth keeping
        processes = 1
        if clock is not None:
            clock.stop()
            seconds, processes = time_spent(self.run_dir, self.stage)
        write_json(
            path,
            {
                "summary": result.summary,
                "outputs": {name: str(output) for name, output in result.outputs.items()},
                "metrics": result.metrics,
                "seconds": round(seconds or 0.0, 3),
                "processes": processes,
            },
        )

    def _write(self, record: dict[str, Any]) -> None:
        _write_record(self.path, self._full(record))

    def _full(self, record: dict[str, Any]) -> dict[str, Any]:
        where = {
            "rank": self.env.rank,
            "world": self.env.world,
            "job": job_name() or self.env.job,
            "restart": restarts(),
        }
        return {"stage": self.stage, "attempt": self.name, **where, **record}

    def _others(self) -> Iterator[dict[str, Any]]:
        for path in self.path.parent.glob("*.json"):
            if (record := _read(path)) is not None:
                yield record

    def _running_beside(self) -> Iterator[dict[str, Any]]:
        for path in (self.run_dir / FOLDER).glob("*/*.json"):
            record = _read(path) if path != self.path else None
            if record is not None and record["code"] is None and is_alive(record, path):
                yield record

    def _marked(self) -> bool:
        """Whether this process has marked its attempt already; then this is it."""
        for path in self.path.parent.glob(f"{attempt_name(self.env)}*.json"):
            record = _read(path)
            if record is not None and record["code"] is None and is_own(record):
                self.name = path.stem
                return True
        return False

    def _free_name(self) -> str:
        base = attempt_name(self.env)
        return next(
            name for k in range(1, 1_000_000) if not self.path.with_name(f"{(name := f'{base}.{k}')}.json").exists()
        )


def attempt_name(env: ProcessEnv) -> str:
    """What this start is called, the same on all its ranks: `TOKSCALE_ATTEMPT`, or as `dist.env.launch_name` says.

    Under Slurm it is `<job id>.<restart count>`, which a batch script knows, too.
    """
    name = os.environ.get(ATTEMPT) or launch_name(env)
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".") or "attempt"


def comes_again(error: BaseException) -> bool:
    """Whether the same job, started again as it is, has a chance: not for what a person has to mend first."""
    if isinstance(error, StopRequested):
        return error.again
    return isinstance(error, StalledError) or (isinstance(error, NodesRefusedError) and bool(error.nodes))


def read_exit(run_dir: Path) -> dict[str, Any] | None:
    """The record of the attempt that ended last, from `exit.json`; None while one is running or when none ever ran.

    Raises:
        DataError: When the file is damaged.
    """
    path = run_dir / EXIT_FILE
    try:
        return read_json(path)
    except DataError:
        if path.exists():
            raise
        return None


def read_outcomes(run_dir: Path, stage: str = "*") -> list[dict[str, Any]]:
    """All attempts' records, oldest first within a stage; `state` is added: `ended`, `running` or `killed`.

    Args:
        run_dir: Whose attempts.
        stage: Of one stage alone.

    A killed attempt is one that has begun, has not ended, and does not live any more.
    """
    found = []
    for path in (run_dir / FOLDER).glob(f"{stage}/*.json"):
        record = _read(path)
        if record is None:
            continue
        alive = record["code"] is None and is_alive(record, path)
        found.append(record | {"state": "ended" if record["code"] is not None else "running" if alive else "killed"})
    return sorted(found, key=lambda record: (record["stage"], record.get("number", 0), record.get("began", 0.0)))


def _read(path: Path) -> dict[str, Any] | None:
    """A record; None when there is none, or none that can be read."""
    try:
        record = read_json(path)
    except (DataError, OSError):
        return None
    code, numbers = record.get("code", ""), (record.get("number", 0), record.get("pid", 0))
    known = isinstance(record.get("stage"), str) and (code is None or isinstance(code, int))
    return record if known and all(isinstance(number, int) for number in numbers) else None


def _write_record(path: Path, record: dict[str, Any]) -> None:
    write_json(path, record)
    again = {None: "-", True: "yes", False: "no"}[record.get("again")]
    code = "-" if record["code"] is None else record["code"]
    line = " ".join([record["stage"], record["attempt"], str(code), again, ",".join(record.get("exclude", ()))]).strip()
    places = [path.with_suffix(".line")]
    if os.environ.get(OUTCOME):  # of the batch script, which does not know the run folder
        places.append(Path(os.environ[OUTCOME]))
    for place in places:
        with atomic_write(place, "w") as file:
            file.write(f"{line}\n")


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _now() -> float:
    return round(time.time(), 3)
