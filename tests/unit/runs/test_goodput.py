"""Goodput: what counts, and what the rest was lost to."""

import json

import pytest

from tokscale.runs.goodput import earlier, goodput, measured
from tokscale.train.ledger import LEDGER_FILE, Ledger, read_ledger


def line(start: float, first: int, last: int, time: float, **seconds: float) -> dict:
    return {"start": start, "first": first, "last": last, "time": time, "seconds": seconds}


STORY = [
    line(100.0, 0, 10, 130.0, steps=20.0, data=5.0, saves=5.0),
    line(100.0, 10, 20, 150.0, steps=20.0),  # its second half was not saved before the kill
    line(200.0, 15, 25, 230.0, steps=18.0, hooks=2.0),  # ten seconds of starting are in it
]


def test_a_step_counts_once_and_the_rest_has_a_name():
    found = measured(STORY, began=90.0)
    assert found.wall == 140 and found.useful == 20 + 10 + 18 and found.share == pytest.approx(48 / 140)
    # 10 before the first line, 60 between the starts, 10 of steps that were done again.
    assert found.lost == {"restarts": 80.0, "data": 5.0, "saves": 5.0, "hooks": 2.0, "stalls": 0.0}
    assert (found.steps, found.repeated, found.starts) == (25, 5, 2) and found.useful_steps == pytest.approx(25 / 30)
    assert found.useful + sum(found.lost.values()) == pytest.approx(found.wall)


def test_what_nobody_accounts_for_is_a_stall():
    found = measured([line(100.0, 0, 10, 110.0, steps=10.0), line(100.0, 10, 20, 150.0, steps=10.0)])
    assert found.lost["stalls"] == 30 and found.share == pytest.approx(20 / 50)


def test_a_run_that_goes_back_twice_loses_each_step_once():
    found = measured(
        [line(1.0, 0, 10, 11.0, steps=10.0), line(20.0, 5, 8, 23.0, steps=3.0), line(30.0, 2, 12, 40.0, steps=10.0)]
    )
    assert (found.steps, found.repeated) == (2 + 10, 8 + 3)


def test_the_ledger_of_a_process_adds_up_and_a_torn_line_is_left_out(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tokscale.train.ledger.time.monotonic", lambda: now[0])
    assert goodput(tmp_path) is None
    ledger = Ledger(tmp_path, 3, writes=True)
    for phase in ("data", "step", "exchange", "report"):
        ledger.enter(phase)
        now[0] += 2
    ledger.write(4)
    now[0] += 1  # the report goes on
    ledger.enter("save")
    now[0] += 5
    ledger.enter("end")
    ledger.write(4)
    with open(tmp_path / LEDGER_FILE, "a") as file:
        file.write(json.dumps({"start": 1})[:5])
    first, second = read_ledger(tmp_path)
    assert (first["first"], first["last"], first["seconds"]) == (3, 4, {"data": 2.0, "steps": 6.0})
    assert second["seconds"] == {"steps": 1.0, "saves": 5.0} and "goodput" in goodput(tmp_path).words()
    Ledger(tmp_path / "other", 0, writes=False).write(9)
    assert not (tmp_path / "other").exists()


def test_a_process_knows_while_it_trains_what_the_run_has_been_worth(tmp_path, monkeypatch):
    monkeypatch.setattr("tokscale.runs.goodput.time.time", lambda: 200.0)
    assert earlier(tmp_path, 0) == (200.0, 0.0)  # nothing has been
    (tmp_path / LEDGER_FILE).write_text("".join(json.dumps(each) + "\n" for each in STORY[:2]))
    assert earlier(tmp_path, 20) == (100.0, 40.0) and earlier(tmp_path, 15) == (100.0, 30.0)
    clock = [0.0]
    monkeypatch.setattr("tokscale.train.ledger.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("tokscale.train.ledger.time.time", lambda: 200.0 + clock[0])
    ledger = Ledger(tmp_path, 15, writes=False, earlier=earlier(tmp_path, 15))
    for phase in ("step", "save", "step", "end"):
        ledger.enter(phase)
        clock[0] += 5
        if phase == "save":
            ledger.write(16)
    assert ledger.goodput == pytest.approx((30 + 10) / (100 + 20))
    assert Ledger(tmp_path, 15, writes=False).goodput is None
