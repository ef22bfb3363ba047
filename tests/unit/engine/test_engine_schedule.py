"""Schedules at the places where they are easy to get wrong: ends of warm-up, hold and run."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.engine.config import ScheduleConfig
from tokscale.engine.schedule import Schedule

KINDS = ("constant", "cosine", "linear", "inverse_sqrt", "exponential")


@pytest.mark.parametrize("kind", KINDS)
def test_rises_to_the_peak_and_ends_at_the_final_ratio(kind):
    schedule = Schedule(ScheduleConfig(kind=kind, warmup_steps=4, hold_steps=3, final_ratio=0.25), 100)
    assert [schedule(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [schedule(step) for step in range(4, 7)] == [1.0, 1.0, 1.0]
    assert schedule(99) == pytest.approx({"constant": 1.0, "inverse_sqrt": (7 / 100) ** 0.5}.get(kind, 0.25))
    assert schedule(150) <= schedule(99)


@pytest.mark.parametrize(("kind", "middle"), [("cosine", 0.6), ("linear", 0.6), ("exponential", 0.2**0.5)])
def test_halfway(kind, middle):
    schedule = Schedule(ScheduleConfig(kind=kind, final_ratio=0.2), 101)
    assert schedule(0) == 1
    assert schedule(50) == pytest.approx(middle)
    assert schedule(500) == pytest.approx(0.2)


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    warmup=st.integers(0, 30),
    hold=st.integers(0, 30),
    beyond=st.integers(0, 200),
    ratio=st.floats(0.01, 1),
)
def test_never_rises_after_warmup_and_stays_in_range(kind, warmup, hold, beyond, ratio):
    config = ScheduleConfig(kind=kind, warmup_steps=warmup, hold_steps=hold, final_ratio=ratio)
    total = warmup + hold + beyond
    factors = [Schedule(config, total)(step) for step in range(total + 5)]
    assert all(0 <= factor <= 1 for factor in factors)
    after = factors[warmup:]
    assert all(late <= early + 1e-12 for early, late in itertools.pairwise(after))


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"warmup_steps=90 .* exceed the run's 50 steps"):
        Schedule(ScheduleConfig(warmup_steps=90), 50)


def test_an_exponential_that_cannot_arrive_is_refused():
    with pytest.raises(ConfigError, match="final_ratio: got 0"):
        decode(ScheduleConfig, {"kind": "exponential"})


def test_the_inverse_root_does_not_fall_below_the_final_ratio():
    schedule = Schedule(ScheduleConfig(kind="inverse_sqrt", warmup_steps=4, final_ratio=0.5), 100)
    assert schedule(8) == pytest.approx(2 / 3) and schedule(99) == 0.5
