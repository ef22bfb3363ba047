"""A bar on a terminal, plain lines in a log, nothing for ranks that do not speak."""

import io
import logging

import pytest

from tokscale.base.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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


def test_a_log_gets_plain_lines_with_figures(lines):
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
    with progress(100, "training", start=90, every_seconds=0, stream=io.StringIO()) as bar:
        bar._began -= 10.0
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
