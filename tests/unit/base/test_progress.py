"""A bar on a terminal, plain lines in a log, nothing for ranks that do not speak."""

import io
import logging

import pytest

from tokscale.base.progress import Pace, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that goes when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """What reaches the log."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("tokscale.progress")
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def test_a_log_gets_plain_lines_with_metrics(lines):
    with progress(4, "counting", every_seconds=0, stream=io.StringIO()) as bar:
        bar.update(1, loss=2.5)
        bar.update(3)
    assert lines[0].startswith("counting: 1/4 (25%)") and lines[0].endswith("loss 2.5") and " left" in lines[0]
    assert lines[-1].startswith("counting: 4/4 (100%)")
    assert len(lines) == 2  # the end is not said twice


def test_a_log_is_not_flooded(lines):
    with progress(1000, "counting", every_seconds=60, stream=io.StringIO()) as bar:
        for _ in range(1000):
            bar.update()
    assert len(lines) == 1


def test_unknown_total_and_an_interrupted_block_still_report(lines):
    with pytest.raises(KeyboardInterrupt), progress(None, "reading", stream=io.StringIO()) as bar:
        bar.update(7)
        raise KeyboardInterrupt
    assert lines == [line for line in lines if line.startswith("reading: 7, ")] and lines


def test_work_taken_up_again_does_not_inflate_the_rate(lines):
    clock = Clock()
    with progress(100, "training", start=90, every_seconds=0, stream=io.StringIO(), clock=clock) as bar:
        clock.now += 10.0
        bar.update(5)
    assert lines[0].startswith("training: 95/100 (95%), 0.5/s, 0:00:10 left")


def test_a_terminal_gets_a_bar(lines):
    terminal = Terminal()
    with progress(4, "counting", stream=terminal) as bar:
        bar.update(4, loss=1.0)
    assert "counting" in terminal.getvalue() and "4/4" in terminal.getvalue() and not lines


def test_a_quiet_rank_says_nothing(lines):
    terminal = Terminal()
    with progress(4, "counting", quiet=True, stream=terminal) as bar:
        bar.update(4)
    assert not terminal.getvalue() and not lines and bar.done == 4


def test_rate_and_time_left_are_those_of_the_last_minute():
    # The machine slowed to a seventh after ten minutes: the mean since the start would say 3:43 left for ten minutes.
    clock = Clock()
    pace = Pace(0, clock)
    for second in range(600):
        clock.now += 1
        pace.add(7 * (second + 1))
    assert pace.words(5400) == "7/s, 0:02:51 left"
    for second in range(90):
        clock.now += 1
        pace.add(4200 + second + 1)
    assert pace.words(5400) == "1/s (6.22/s on average), 0:18:30 left"


def test_the_rate_of_slow_units_is_not_nothing_between_them():
    clock = Clock()
    pace = Pace(0, clock)
    for unit in range(4):
        clock.now += 300
        pace.add(unit + 1)
    clock.now += 150
    assert pace.words(10) == "0.00222/s, 0:45:00 left"  # a unit in the last 450 seconds, six to come
    clock.now += 1050
    assert "nothing for 0:20:00" in pace.words(10)


def test_a_log_says_that_nothing_comes_any_more(lines):
    clock = Clock()
    with progress(100, "training", every_seconds=10, stream=io.StringIO(), clock=clock) as bar:
        for _ in range(50):
            clock.now += 1
            bar.update(1)
        said = len(lines)
        clock.now += 59
        bar.tick()
        assert len(lines) == said
        for _ in range(3):
            clock.now += 61
            bar.tick()
            bar.tick()
        assert [line.rpartition(", ")[2] for line in lines[said:]] == [
            "nothing for 0:02:00",
            "nothing for 0:03:01",
            "nothing for 0:04:02",
        ]
        clock.now += 1
        bar.update(1)
    assert "nothing" not in lines[-1]


def test_the_memory_of_a_pace_is_bounded():
    clock = Clock()
    pace = Pace(0, clock)
    for done in range(5000):
        clock.now += 0.5
        pace.add(done)
    assert len(pace._marks) <= 63


def test_a_bar_shows_the_pace_of_the_last_minute():
    clock, terminal = Clock(), Terminal()
    with progress(1000, "counting", stream=terminal, clock=clock) as bar:
        clock.now += 10
        bar.update(100)
        clock.now += 1000
        bar.update(1)
    assert "0.001/s (0.1/s on" in terminal.getvalue()
