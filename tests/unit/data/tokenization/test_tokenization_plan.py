"""The plan: decided once, the same for every planner, extendable without renumbering, and never silently another."""

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokscale.base.errors import DataError
from tokscale.data.tokenization.plan import InputShard, Outcome, grouped, make_plan, read_plan


def shards(*samples: int | None, first: int = 0) -> list[InputShard]:
    return [
        InputShard(path=f"{first + i:05d}.tar", bytes=(count or 7) * 1000, samples=count)
        for i, count in enumerate(samples)
    ]


def ranges(plan) -> list[tuple[int, int]]:
    return [(unit.first_input, unit.first_input + len(unit.inputs)) for unit in plan.units]


def test_inputs_are_grouped_into_units(tmp_path):
    plan = make_plan(tmp_path, {"a": 1}, lambda: shards(40, 40, 40, 120, 10, 10), 100)
    assert ranges(plan) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert [unit.expected for unit in plan.units] == [80, 40, 120, 20] and plan.expected == 260
    assert (
        make_plan(tmp_path, {"a": 1}, lambda: shards(40, 40, 40, 120, 10, 10), 7).units[0].expected == 80
    )  # not again


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_every_input_is_in_exactly_one_unit(samples, unit_samples):
    sizes = grouped(shards(*samples), unit_samples)
    assert sum(sizes) == len(samples) and min(sizes) > 0
    at = 0
    for size in sizes:
        assert size == 1 or sum(samples[at : at + size]) <= unit_samples
        at += size


def test_unknown_counts_are_estimated_but_not_invented(tmp_path):
    plan = make_plan(tmp_path, {}, lambda: shards(None, 5), 100)
    assert plan.expected is None and plan.units[0].expected is None


def test_an_extension_adds_units_and_renumbers_nothing(tmp_path):
    before = make_plan(tmp_path, {"a": 1}, lambda: shards(50, 50), 50)
    after = make_plan(tmp_path, {"a": 1}, lambda: [*shards(50, 50), *shards(20, 20, first=2)], 50)
    assert ranges(after)[: len(before.units)] == ranges(before) and ranges(after)[-1] == (2, 4)
    assert ranges(read_plan(tmp_path)) == ranges(after)
    # a new input that sorts before the old ones still comes after them
    again = make_plan(tmp_path, {"a": 1}, lambda: [InputShard(path="-.tar", bytes=5), *after.inputs], 50)
    assert again.inputs[-1].path == "-.tar" and ranges(again)[:3] == ranges(after)


def test_planners_at_the_same_time_agree(tmp_path):
    found = []
    start, present = threading.Barrier(8), [10] * 3

    def plan() -> None:
        start.wait()
        present.append(10)  # inputs arrive while everybody plans
        found.append(make_plan(tmp_path, {}, lambda: shards(*present), 20))

    threads = [threading.Thread(target=plan) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    make_plan(tmp_path, {}, lambda: shards(*present), 20)
    final = read_plan(tmp_path)
    assert len(found) == 8 and [shard.path for shard in final.inputs] == [f"{i:05d}.tar" for i in range(11)]
    assert all(ranges(final)[: len(plan.units)] == ranges(plan) for plan in found)
    assert not list((tmp_path / "plan").glob(".*"))


def test_another_tokenization_is_refused_saying_what_differs(tmp_path):
    make_plan(tmp_path, {"tokenizers": {"codes": "abc"}, "encode_batch": 32}, lambda: shards(10), 20)
    with pytest.raises(
        DataError, match=r'What differs: tokenizers \{"codes": "abc"\} -> \{"codes": "xyz"\}\. Set .*tokens='
    ):
        make_plan(tmp_path, {"tokenizers": {"codes": "xyz"}, "encode_batch": 32}, lambda: shards(10), 20)


def test_only_inputs_that_were_read_must_stay_as_they_were(tmp_path):
    plan = make_plan(tmp_path, {}, lambda: shards(10, 10), 20)
    read = lambda plan: Outcome(read=frozenset({0, 1}))  # noqa: E731
    assert make_plan(tmp_path, {}, lambda: shards(10), 20, read).inputs == plan.inputs  # gone: not needed any more
    with pytest.raises(DataError, match=r"00001\.tar had 10000 bytes .* has 11000 now.*redo_changed=true"):
        make_plan(tmp_path, {}, lambda: shards(10, 11), 20, read)
    assert make_plan(tmp_path, {}, lambda: shards(10, 11), 20).inputs == plan.inputs
    with pytest.raises(DataError, match="tokscale prepare"):
        make_plan(tmp_path / "empty", {}, lambda: [], 20)


def test_a_mended_input_is_planned_anew_and_nothing_is_renumbered(tmp_path):
    plan = make_plan(tmp_path, {}, lambda: shards(10, 10, 10), 30)
    again = make_plan(tmp_path, {}, lambda: shards(10, 11, 10), 30, lambda plan: Outcome(mended=frozenset({1})))
    assert again.inputs[:3] == plan.inputs and again.inputs[3] == shards(10, 11)[1]
    assert [list(unit.numbers) for unit in again.units] == [[0, 1, 2], [3]]
    assert again.latest == {"00000.tar": 0, "00001.tar": 3, "00002.tar": 2}


def test_an_edited_plan_is_refused(tmp_path):
    make_plan(tmp_path, {}, lambda: shards(10, 10), 10)
    make_plan(tmp_path, {}, lambda: shards(10, 10, 10), 10)
    path = tmp_path / "plan" / "000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"units": [2]}))
    with pytest.raises(DataError, match=r"001\.json: does not continue the plan"):
        read_plan(tmp_path)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"000\.json: not a PlanPart"):
        read_plan(tmp_path)
    assert read_plan(tmp_path / "none") is None
