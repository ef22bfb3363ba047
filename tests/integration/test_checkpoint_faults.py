"""Whatever happens to a process, a disk or a file: a restart goes on bit for bit from the newest whole checkpoint.

The rounds are played by `checkpoint_rounds.py`; every failing row names the seed that plays it again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("checkpoint_rounds.py")
FIRST_ROUND = 20_000_000
"""Seed of the first round; no test depends on the day it runs."""


def play(out: Path, *arguments: object) -> dict[str, Any]:
    """The report of a game of rounds."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, arguments), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(out.read_text())
    assert [row for row in report["rounds"] if row["wrong"]] == []
    return report


def test_twenty_random_faults_lose_nothing(tmp_path):
    report = play(tmp_path / "report.json", "random", FIRST_ROUND, 20)
    assert len(report["rounds"]) == 20
    assert {row["outcome"] for row in report["rounds"]} <= {"bit-equal", "refused"}


def test_a_kill_before_any_call_of_a_save_loses_nothing(tmp_path):
    report = play(tmp_path / "report.json", "every-call", "last-save", "kill-before")
    rows = report["rounds"]
    assert len(rows) > 40 and all(row["first_exit"] == -9 for row in rows)
    # Early kills fall back to the save before, late ones find the new checkpoint; nothing lies between.
    resumed = [row["resumed"] for row in rows]
    assert resumed == sorted(resumed) and set(resumed) == {6, 8}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_hundred_and_eighty_random_faults_lose_nothing(tmp_path):
    report = play(tmp_path / "report.json", "random", FIRST_ROUND + 500, 180)
    assert {row["fault"] for row in report["rounds"]} >= {
        "kill-before",
        "kill-after",
        "kill-any-time",
        "full",
        "refused",
    }
    assert {row["damage"] for row in report["rounds"]} >= {"truncate", "flip", "delete", "mix_file", "mix_folder"}


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", ["kill-before", "kill-after", "refused", "full"])
def test_no_fault_at_any_call_of_a_run_loses_anything(tmp_path, fault):
    report = play(tmp_path / "report.json", "every-call", "whole-run", fault)
    assert len(report["rounds"]) == report["calls_of_one_run"]
