"""What the time of a process went into, line by line, for `runs.goodput`."""

import json
import time
from pathlib import Path
from typing import Any

from tokscale.base.files import read_regular, row_of, storage_errors
from tokscale.base.text import lines_of

LEDGER_FILE = "goodput.jsonl"
SPENT = ("steps", "data", "saves", "hooks")
_KINDS = {
    "first data": "data",
    "data": "data",
    "step": "steps",
    "exchange": "steps",  # where the host waits for the device
    "report": "steps",
    "measure": "hooks",
    "hooks": "hooks",
    "save": "saves",
}
"""What each phase of the loop counts as."""


class Ledger:
    """Adds up the seconds of the phases, and writes them down. For the main rank; the others only add up."""

    def __init__(self, folder: Path, step: int, *, writes: bool, earlier: tuple[float, float] | None = None):
        """Begin at a step.

        Args:
            folder: The run's.
            step: Steps done.
            writes: Whether this rank writes.
            earlier: When the run was first submitted, and the useful seconds of its earlier processes.
        """
        self._earlier, self._useful = earlier, 0.0
        self._path, self._writes = folder / LEDGER_FILE, writes
        self._start, self._step = round(time.time(), 3), step
        self._kind, self._since = "", time.monotonic()
        self._seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """The loop enters a phase."""
        now = time.monotonic()
        if self._kind:
            self._seconds[self._kind] = self._seconds.get(self._kind, 0.0) + now - self._since
        self._kind, self._since = _KINDS.get(phase, ""), now

    @property
    def goodput(self) -> float | None:
        """Useful seconds so far over all since the run was first submitted; None where nobody said when that was."""
        if self._earlier is None:
            return None
        began, useful = self._earlier
        useful += self._useful + self._seconds.get("steps", 0.0)
        return useful / max(time.time() - began, useful, 1e-9)

    def write(self, step: int) -> None:
        """Append a line about what happened since the last one, up to `step` steps."""
        kind = self._kind
        self.enter("")
        self._kind = kind
        if self._writes and (self._seconds or step != self._step):
            seconds = {name: round(value, 4) for name, value in self._seconds.items()}
            line = {"start": self._start, "first": self._step, "last": step, "time": round(time.time(), 3)}
            with storage_errors(self._path), open(self._path, "a") as file:
                file.write(json.dumps(line | {"seconds": seconds}) + "\n")
        self._useful += self._seconds.get("steps", 0.0)
        self._seconds, self._step = {}, step


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """The lines so far; a torn one is left out."""
    path = folder / LEDGER_FILE
    lines = lines_of(read_regular(path).decode(errors="replace")) if path.exists() else []
    rows = (row_of(line, "start", "first", "last", "time", "seconds") for line in lines)
    return [row for row in rows if row is not None]
