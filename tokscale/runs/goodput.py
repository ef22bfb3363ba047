"""Goodput: the share of the time since a run was first submitted that went into training steps which count.

The main rank's loop appends to `goodput.jsonl`, at each report and at the end of a process, what its time went into
since the line before. A step counts once: what was trained beyond the checkpoint from which a later start went on was
lost to the restart, and so was the time between the last line of one start and the first step of the next.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokscale.runs.restarts import read_starts
from tokscale.runs.saved import unsaved
from tokscale.runs.submitted import SUBMITTED
from tokscale.train.ledger import SPENT, read_ledger


@dataclass(frozen=True)
class Goodput:
    """Where the time of a run went; all in seconds."""

    wall: float
    """Since the first submission, or the first start of a run that was never submitted."""
    useful: float
    """Steps that count."""
    lost: Mapping[str, float] = field(default_factory=dict)
    """`restarts` (between starts, starting, and steps done again), `saves`, `data` (waiting for it), `hooks`, and
    `stalls`: whatever nobody accounted for."""
    steps: int = 0
    """That count."""
    repeated: int = 0
    """Steps that were done and lost to restarts."""
    starts: int = 0

    @property
    def share(self) -> float:
        """Of the wall time."""
        return self.useful / self.wall if self.wall > 0 else 0.0

    @property
    def useful_steps(self) -> float:
        """Share of all steps that were done."""
        done = self.steps + self.repeated
        return self.steps / done if done else 0.0

    def words(self) -> str:
        """For a person."""
        lost = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.lost.items() if seconds >= 0.5)
        return (
            f"goodput {100 * self.share:.1f} % of {self.wall:.0f} s since the first submission, {self.starts} starts, "
            f"{self.repeated} of {self.steps + self.repeated} steps done again" + (f"; lost to {lost}" if lost else "")
        )


def goodput(folder: Path) -> Goodput | None:
    """Of a run folder, up to the last line of its ledger; None when it has none."""
    lines = read_ledger(folder)
    return measured(lines, began=_first_submission(folder)) if lines else None


def earlier(folder: Path, step: int) -> tuple[float, float]:
    """For a process that goes on from `step`: when the run was first submitted, and its useful seconds so far.

    What an earlier process trained beyond that step is lost by now.
    """
    now, lines = time.time(), read_ledger(folder)
    here = {"start": now, "first": step, "last": step, "time": now, "seconds": {}}
    found = measured([*lines, here], began=_first_submission(folder))
    return now - found.wall, found.useful


def measured(lines: Sequence[Mapping[str, Any]], began: float | None = None) -> Goodput:
    """Of a ledger.

    Args:
        lines: As they were written: `start` (when the process began its loop), `first` and `last` step, `time` and the
            seconds spent by kind.
        began: When the run was first submitted; by default when its first process began.
    """
    began = min(began or lines[0]["start"], lines[0]["start"])
    wall = lines[-1]["time"] - began
    starts = list(dict.fromkeys(line["start"] for line in lines))
    kept, repeated, again = _that_count(lines)
    lost = {name: sum(line["seconds"].get(name, 0.0) for line in lines) for name in SPENT if name != "steps"}
    useful = sum(line["seconds"].get("steps", 0.0) * share for line, share in zip(lines, kept, strict=True))
    gaps, before = 0.0, began
    for start in starts:
        own = [line for line in lines if line["start"] == start]
        gaps += max(own[0]["time"] - sum(own[0]["seconds"].values()) - before, 0.0)
        before = own[-1]["time"]
    lost = {"restarts": gaps + again, **lost}
    lost["stalls"] = max(wall - useful - sum(lost.values()), 0.0)
    steps = round(sum((line["last"] - line["first"]) * share for line, share in zip(lines, kept, strict=True)))
    return Goodput(wall, useful, lost, steps=steps, repeated=repeated, starts=len(starts))


def _that_count(lines: Sequence[Mapping[str, Any]]) -> tuple[list[float], int, float]:
    """Which share of each line's steps counts, how many do not, and the seconds of those."""
    kept, repeated, seconds = [], 0, 0.0
    for number, line in enumerate(lines):
        later = (other["first"] for other in lines[number + 1 :] if other["start"] != line["start"])
        until = min([line["last"], *later])
        steps = line["last"] - line["first"]
        share = max(until - line["first"], 0) / steps if steps else 1.0
        kept.append(share)
        repeated += steps - round(steps * share)
        seconds += line["seconds"].get("steps", 0.0) * (1 - share)
    return kept, repeated, seconds


def _first_submission(folder: Path) -> float | None:
    times = [start["time"] for start in read_starts(folder)]
    times += [path.stat().st_mtime for path in _files(folder / SUBMITTED)]
    others = [start["time"] for aside in unsaved(folder) for start in read_starts(aside)]
    return min((time for time in times if time > max(others, default=0.0)), default=None)


def _files(folder: Path) -> Iterable[Path]:
    return folder.glob("*/jobs.json") if folder.is_dir() else ()
