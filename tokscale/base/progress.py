"""One way to show how far a stage is: a bar for a person at a terminal, a plain line now and then in a log."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from tokscale.base.log import logger

WINDOW_SECONDS = 60.0
"""The rate and the time left are those of so long before now, and of no older time."""
_SLOWED = 0.5
"""Below this share of the mean since the start, the mean is shown, too."""
_TICK_SECONDS = 1.0
_LATE = 3.0
"""So many times what a unit takes on average may pass before it is said that none has come."""
Clock = Callable[[], float]
log = logger("progress")


class Pace:
    """How fast work goes now: the rate of the last minute, and how long nothing has come."""

    def __init__(self, done: int, clock: Clock = time.monotonic):
        """Begin to measure.

        Args:
            done: Units of work that were done before.
            clock: Gives seconds; another one in tests.
        """
        self._clock = clock
        self._first = self._last = (clock(), done)
        self._marks: deque[tuple[float, int]] = deque([self._first])

    def add(self, done: int) -> None:
        """So many units are done now."""
        now = self._clock()
        self._last = (now, done)
        # A mark a second is as exact as a person can see, and bounds the memory of a fast loop.
        if now - self._marks[-1][0] >= 1.0:
            self._marks.append(self._last)
        self._forget(now)

    @property
    def silent(self) -> float:
        """Seconds since the last unit."""
        return self._clock() - self._last[0]

    @property
    def rate(self) -> float:
        """Units a second over the last minute, or since the last unit but one where that is longer ago."""
        now = self._clock()
        self._forget(now)
        began, before = self._marks[0]
        return max(self._last[1] - before, 0) / max(now - began, 1e-9)

    @property
    def mean(self) -> float:
        """Units a second since the start."""
        return max(self._last[1] - self._first[1], 0) / max(self._clock() - self._first[0], 1e-9)

    def _forget(self, now: float) -> None:
        # One mark older than the window stays, and two in all: of slow units there may be none inside.
        while len(self._marks) > 2 and self._marks[1][0] <= now - WINDOW_SECONDS:
            self._marks.popleft()

    @property
    def stalled(self) -> bool:
        """Whether nothing has come for a minute, and for much longer than a unit takes."""
        (began, before), (last, done) = self._first, self._last
        return self.silent >= max(WINDOW_SECONDS, _LATE * (last - began) / max(done - before, 1))

    def words(self, total: int | None) -> str:
        """Rate, time left, and what a person should know of both: `0.5/s (3.4/s on average), 0:10:00 left`."""
        rate, mean, done = self.rate, self.mean, self._last[1]
        words = f"{rate:.3g}/s"
        if rate < _SLOWED * mean:
            words += f" ({mean:.3g}/s on average)"
        if total is not None and self._first[1] < done < total and rate > 0:
            words += f", {_duration((total - done) / rate)} left"
        return words + (f", nothing for {_duration(self.silent)}" if self.stalled else "")


class Progress:
    """Counts units of work. This one shows nothing: what every rank but the first gets."""

    def __init__(self, total: int | None, label: str, start: int = 0, clock: Clock = time.monotonic):
        self.total, self.label, self.done = total, label, start
        self.metrics: dict[str, Any] = {}
        self.pace = Pace(start, clock)

    def update(self, n: int = 1, **metrics: Any) -> None:
        """`n` more units are done; `metrics` are shown beside the bar, e.g. `loss=2.31`, and stay until replaced."""
        self.done += n
        self.metrics |= metrics
        self.pace.add(self.done)
        self._show()

    def tick(self) -> None:
        """Called each second, whether or not work goes on."""

    def close(self) -> None:
        """Show the last state."""

    def _show(self) -> None:
        pass


class _Lines(Progress):
    """A line each `every` seconds and one at the end; and one a minute while nothing comes."""

    def __init__(self, total: int | None, label: str, start: int, every: float, clock: Clock):
        super().__init__(total, label, start, clock)
        self._clock, self._every, self._next, self._shown = clock, every, clock() + every, -1
        self._silence = 0.0
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick_on, name="progress", daemon=True)
        self._ticker.start()

    def tick(self) -> None:
        """Say so when nothing has come for a minute, and again each minute."""
        if self.pace.stalled and self.pace.silent >= self._silence:
            self._silence = self.pace.silent + WINDOW_SECONDS
            self._line()

    def _tick_on(self) -> None:
        while not self._over.wait(_TICK_SECONDS):
            self.tick()

    def _show(self) -> None:
        self._silence = 0.0
        if self._clock() >= self._next:
            self._next = self._clock() + self._every
            self._line()

    def close(self) -> None:
        self._over.set()
        self._ticker.join()
        if self._shown != self.done:
            self._line()

    def _line(self) -> None:
        self._shown = self.done
        share = f"/{self.total} ({100 * self.done / max(self.total, 1):.0f}%)" if self.total is not None else ""
        log.info("%s: %d%s, %s%s", self.label, self.done, share, self.pace.words(self.total), _words(self.metrics))


class _Bar(Progress):
    """A rich bar, redrawn a few times a second by rich itself."""

    def __init__(self, total: int | None, label: str, start: int, stream: IO[str], clock: Clock):
        from rich import progress as bars
        from rich.console import Console
        from rich.text import Text

        super().__init__(total, label, start, clock)

        class _Pace(bars.ProgressColumn):
            # Asked anew at each refresh, so that a time left does not stand still with the work.
            def render(column, task: bars.Task) -> Text:  # noqa: N805
                return Text(self.pace.words(self.total), no_wrap=True)

        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            _Pace(),
            bars.TextColumn("{task.fields[words]}"),
            console=Console(file=stream),
        )
        self._task = self._bars.add_task(label, total=total, completed=start, words="")
        self._bars.start()

    def _show(self) -> None:
        self._bars.update(self._task, completed=self.done, words=_words(self.metrics).removeprefix(", "))

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
    clock: Clock = time.monotonic,
) -> Iterator[Progress]:
    """Show the progress of a block of work.

    Args:
        total: Units of work, or None when unknown.
        label: What is being done, e.g. `"training"`.
        start: Units that were done before, when work is taken up again.
        quiet: Show nothing: for ranks that do not speak.
        every_seconds: How often a log gets a line.
        stream: Where a bar would be drawn; standard error by default. A bar is drawn only on a terminal.
        clock: Gives seconds; another one in tests.
    """
    bar = _choose(total, label, start, quiet, every_seconds, stream or sys.stderr, clock)
    try:
        yield bar
    finally:
        bar.close()


def _choose(
    total: int | None, label: str, start: int, quiet: bool, every_seconds: float, stream: IO[str], clock: Clock
) -> Progress:
    if quiet:
        return Progress(total, label, start, clock)
    if stream.isatty():
        try:
            return _Bar(total, label, start, stream, clock)
        except ImportError:  # rich comes with the `train` extra
            pass
    return _Lines(total, label, start, every_seconds, clock)


def _words(metrics: Mapping[str, Any]) -> str:
    shown = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
    )
    return "".join(f", {words}" for words in shown)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
