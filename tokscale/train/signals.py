"""Ways to ask a run to stop or to save: signals, files, a deadline. Each only sets a flag, for the loop to act on."""

import signal
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from tokscale.base.log import logger

log = logger("train")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE, SAVE_FILE = "STOP", "SAVE"


class Requests(AbstractContextManager["Requests"]):
    """Collects requests inside its context.

    Schedulers send SIGUSR1 or SIGTERM ahead of the end, to one rank or to all; a person presses Ctrl-C, or puts a file
    named `STOP` or `SAVE` into the run folder, which the main rank polls and removes. A second Ctrl-C interrupts.
    """

    def __init__(self, folder: Path, *, is_main: bool = True, deadline: float | None = None):
        """Watch `folder`; `deadline` is a `time.monotonic()` after which the run should save and stop."""
        self._folder, self._is_main, self._deadline = folder, is_main, deadline
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
        """What this rank was asked for: `stop`, `save`. The ranks' answers differ, so they must be agreed on."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return {
            "stop": self._signal is not None or late or self._file(STOP_FILE),
            "save": self._file(SAVE_FILE),
        }

    def reason(self) -> str:
        """Why this rank would stop, for the log; empty when it was another rank's wish."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "time limit"
        return f"file {STOP_FILE}" if self._file(STOP_FILE) else ""

    def answered(self, name: str) -> None:
        """The request `stop` or `save` was met: remove its file, so that the next start does not meet it again."""
        if self._is_main:
            (self._folder / name.upper()).unlink(missing_ok=True)

    def _file(self, name: str) -> bool:
        return self._is_main and (self._folder / name).exists()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
