"""One way to show how far a stage is: a bar for a person at a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from tokscale.base.log import logger

log = logger("progress")


class Progress:
    """Counts units of work. This one shows nothing: what every rank but the first gets."""

    def __init__(self, total: int | None, label: str, start: int = 0):
        self.total, self.label, self.start, self.done = total, label, start, start
        self.figures: dict[str, Any] = {}
        self._began = time.monotonic()

    def update(self, n: int = 1, **figures: Any) -> None:
        """`n` more units are done; `figures` are shown beside the bar, e.g. `loss=2.31`, and stay until replaced."""
        self.done += n
        self.figures |= figures
        self._show()

    def close(self) -> None:
        """Show the last state."""

    def _show(self) -> None:
        pass

    def _rate(self) -> float:
        return (self.done - self.start) / max(time.monotonic() - self._began, 1e-9)


class _Lines(Progress):
    """A line each `every` seconds and one at the end."""

    def __init__(self, total: int | None, label: str, start: int, every: float):
        super().__init__(total, label, start)
        self._every, self._next, self._shown = every, time.monotonic() + every, -1

    def _show(self) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            self._line()

    def close(self) -> None:
        if self._shown != self.done:
            self._line()

    def _line(self) -> None:
        self._shown = self.done
        share = f"/{self.total} ({100 * self.done / max(self.total, 1):.0f}%)" if self.total is not None else ""
        left = ""
        if self.total is not None and self.start < self.done < self.total:
            left = f", {_duration((self.total - self.done) / self._rate())} left"
        log.info("%s: %d%s, %.3g/s%s%s", self.label, self.done, share, self._rate(), left, _words(self.figures))


class _Bar(Progress):
    """A rich bar, redrawn a few times a second by rich itself."""

    def __init__(self, total: int | None, label: str, start: int, stream: IO[str]):
        from rich import progress as bars
        from rich.console import Console

        super().__init__(total, label, start)
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[words]}"),
            console=Console(file=stream),
        )
        self._task = self._bars.add_task(label, total=total, completed=start, words="")
        self._bars.start()

    def _show(self) -> None:
        self._bars.update(self._task, completed=self.done, words=_words(self.figures).removeprefix(", "))

    def close(self) -> None:
        self._bars.stop()


@contextmanager
def progress(
    total: int | None,
    label: str,
    *,
    start: int = 0,
    quiet: bool = False,
    every_seconds: float = 10.0,
    stream: IO[str] | None = None,
) -> Iterator[Progress]:
    """Show the progress of a block of work.

    Args:
        total: Units of work, or None when unknown.
        label: What is being done, e.g. `"training"`.
        start: Units that were done before, when work is taken up again.
        quiet: Show nothing: for ranks that do not speak.
        every_seconds: How often a log gets a line.
        stream: Where a bar would be drawn; standard error by default. A bar is drawn only on a terminal.
    """
    bar = _choose(total, label, start, quiet, every_seconds, stream or sys.stderr)
    try:
        yield bar
    finally:
        bar.close()


def _choose(total: int | None, label: str, start: int, quiet: bool, every_seconds: float, stream: IO[str]) -> Progress:
    if quiet:
        return Progress(total, label, start)
    if stream.isatty():
        try:
            return _Bar(total, label, start, stream)
        except ImportError:  # rich comes with the `train` extra
            pass
    return _Lines(total, label, start, every_seconds)


def _words(figures: Mapping[str, Any]) -> str:
    shown = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    )
    return "".join(f", {words}" for words in shown)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
