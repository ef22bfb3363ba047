"""How a stage ended, left in the run folder: launchers swallow exit codes, and a later report wants the figures."""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokscale.base.errors import DataError, TokscaleError
from tokscale.base.files import atomic_write, read_json, write_json
from tokscale.base.log import logger
from tokscale.runs.clock import StageClock, time_spent
from tokscale.runs.stage import StageResult

EXIT_FILE = "exit.json"
log = logger("stages")


class RunFolderRefused(TokscaleError):  # noqa: N818 - reads as what happened
    """The run folder belongs to someone else, so nothing may be changed there, not even to say that we were refused."""


def begin_outcome(run_dir: Path) -> bytes | None:
    """Take away how an earlier process ended, so that a process that is killed leaves nothing that looks like success.

    By the main rank, before the stage runs.

    Returns:
        What was there, for `give_back_outcome`.
    """
    path, before = run_dir / EXIT_FILE, None
    with suppress(FileNotFoundError):  # none is there, or another job that begins is taking it away
        before = path.read_bytes()
    path.unlink(missing_ok=True)
    return before


def give_back_outcome(run_dir: Path, before: bytes | None) -> None:
    """Put back what `begin_outcome` took: the run folder turned out to be somebody else's, where nobody works."""
    if before is not None:
        with atomic_write(run_dir / EXIT_FILE) as file:
            file.write(before)


def record_success(
    run_dir: Path, stage: str, result: StageResult, *, seconds: float | None = None, clock: StageClock | None = None
) -> None:
    """Write `exit.json`, and `stages/<stage>.json` with the stage's figures. By the main rank.

    Args:
        run_dir: The stage's run folder.
        stage: Which stage.
        result: How it ended.
        clock: Of this process; the seconds are those of all processes, interrupted ones included.
        seconds: Taken instead, without a clock.
    """
    _write_exit(run_dir, stage, 0, result.summary)
    path = run_dir / "stages" / f"{stage}.json"
    if result.skipped and path.exists():
        if clock is not None:
            clock.forget()
        return  # the figures of the run that did the work are the ones worth keeping
    processes = 1
    if clock is not None:
        clock.stop()
        seconds, processes = time_spent(run_dir, stage)
    write_json(
        path,
        {
            "summary": result.summary,
            "outputs": {name: str(output) for name, output in result.outputs.items()},
            "figures": result.figures,
            "seconds": round(seconds or 0.0, 3),
            "processes": processes,
        },
    )


def record_failure(run_dir: Path, stage: str, code: int, error: BaseException, *, create: bool) -> None:
    """Write `exit.json`. By any rank; the first failure stays, since the others follow from it.

    A success does not stay: an earlier job writes it when the folder is free again, and this one may have begun then.

    Args:
        run_dir: The stage's run folder.
        stage: Which stage.
        code: Its exit code.
        error: Why.
        create: Make the folder when it is missing.
    """
    if not (create or run_dir.is_dir()) or _has_failed(run_dir):
        return
    try:
        _write_exit(run_dir, stage, code, f"{type(error).__name__}: {error}")
    except (OSError, TokscaleError) as problem:  # the disk may be what failed
        log.warning("%s could not be written: %s", run_dir / EXIT_FILE, problem)


def read_exit(run_dir: Path) -> dict[str, Any] | None:
    """What the last process left in `exit.json`; None while one is running or when none ever ran."""
    path = run_dir / EXIT_FILE
    try:
        return read_json(path)
    except DataError:
        if path.exists():
            raise
        return None


def _has_failed(run_dir: Path) -> bool:
    try:
        ended = read_exit(run_dir)
    except DataError:
        return False
    return ended is not None and ended["code"] != 0


def _write_exit(run_dir: Path, stage: str, code: int, message: str) -> None:
    write_json(
        run_dir / EXIT_FILE,
        {
            "stage": stage,
            "code": code,
            "message": message,
            "time": round(time.time(), 3),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        },
    )
