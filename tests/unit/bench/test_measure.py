"""What the benches measure with: rounds, threads, and a share of the time."""

import pytest
import torch

from tokscale.bench import measure


def test_the_first_round_is_not_counted_and_of_the_others_the_best_is(monkeypatch):
    taken = iter([0.001, 0.002, 5.0, 7.0, 3.0, 9.0, 4.0, 6.0])
    calls: list[str] = []

    def seconds(call, device):
        call()
        return next(taken)

    monkeypatch.setattr(measure, "seconds_of", seconds)
    sides = {name: lambda name=name: calls.append(name) for name in ("ours", "baseline")}
    assert measure.interleaved(sides, rounds=3) == {"ours": 3.0, "baseline": 6.0}
    assert calls == ["ours", "baseline"] * 4


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_sides_run_on_one_thread_and_the_number_of_threads_comes_back(three_threads):
    seen: list[int] = []
    measure.interleaved({"ours": lambda: seen.append(torch.get_num_threads())}, rounds=1)
    assert seen == [1, 1] and torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError):
        measure.interleaved({"ours": lambda: 1 / 0}, rounds=1)
    assert torch.get_num_threads() == 3


def test_a_ratio_above_one_is_better_whatever_is_measured():
    assert measure.row("step", 2.0, 6.0, "s")["ratio"] == 3.0
    assert measure.row("rate", 6.0, 2.0, "1/s", more_is_better=True)["ratio"] == 3.0
