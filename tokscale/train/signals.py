"""Ways to ask a run to stop or to save: signals, files, a deadline. Each only sets a flag, for the loop to act on."""

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from tokscale.base.log import logger

log = logger("train")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REQUEUE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Those that a scheduler sends; Ctrl-C is a person's."""
STOP_FILE, SAVE_FILE = "STOP", "SAVE"
_LATELY = 16
"""Steps by which the time to stop is judged."""


class StopRequests(AbstractContextManager["StopRequests"]):
    """Collects requests inside its context.

    Schedulers send SIGUSR1 or SIGTERM ahead of the end, to one rank or to all; a person presses Ctrl-C, or puts a file
    named `STOP` or `SAVE` into the run folder, which the main rank polls and removes. A second Ctrl-C interrupts.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_main: bool = True,
        deadline: float | None = None,
        ending: Callable[[], bool] | None = None,
    ):
        """Watch for requests.

        Args:
            folder: Where files are looked for.
            is_main: Whether this rank looks for them.
            deadline: A `time.monotonic()` after which the run should save and stop.
            ending: Tells whether the scheduler's time is about to end; asked on the main rank only.
        """
        self._folder, self._is_main, self._deadline = folder, is_main, deadline
        self._ending = ending if is_main else None
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def flags(self) -> Mapping[str, bool]:
        """What this rank was asked for. The ranks' answers differ, so they must be agreed on.

        `stop` and `save` say what to do; `requeue`, that whoever asked to stop means the run to go on later: a
        scheduler or a time limit, not a person.
        """
        requeue = self._signal in REQUEUE_SIGNALS or self._late() or self._ends()
        return {
            "stop": self._signal is not None or requeue or self._file(STOP_FILE),
            "save": self._file(SAVE_FILE),
            "requeue": requeue,
        }

    def reason(self) -> str:
        """Why this rank would stop, for the log; empty when it was another rank's wish."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._late():
            return "time limit"
        if self._ends():
            return "Slurm time limit"
        return f"file {STOP_FILE}" if self._file(STOP_FILE) else ""

    def acknowledge(self, name: str) -> None:
        """The request `stop` or `save` was met: remove its file, so that the next start does not meet it again."""
        if self._is_main:
            (self._folder / name.upper()).unlink(missing_ok=True)

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _ends(self) -> bool:
        return self._ending is not None and self._ending()

    def _file(self, name: str) -> bool:
        return self._is_main and (self._folder / name).exists()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number


class TimeToStop:
    """How long it may take to save and stop: the step in work and a save, with as much again to spare."""

    def __init__(self) -> None:
        """No step has ended yet."""
        self._paces: deque[float] = deque(maxlen=_LATELY)
        self._ended: float | None = None

    def step(self) -> None:
        """A step ends."""
        now = time.monotonic()
        if self._ended is not None:
            self._paces.append(now - self._ended)
        self._ended = now

    def pause(self) -> None:
        """What comes before the next step ends is not that step's alone."""
        self._ended = None

    def seconds(self, save: float) -> float:
        """By the slowest of the last steps.

        Args:
            save: What the last save took, in seconds.
        """
        return 2 * (max(self._paces, default=0.0) + save)
