"""Mixtures: exact proportions, seekable, and changes that continue where each source stood."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokscale.base.errors import ConfigError
from tokscale.data.loading.mixture import SLOTS, Mixture, MixtureTable, Segment, Source


def stream(mixture: Mixture, start: int, stop: int) -> list[tuple[int, int, int]]:
    """(segment, source, own position) of every position, the slow way round."""
    found: list[tuple[int, int, int] | None] = [None] * (stop - start)
    for part in mixture.parts(start, stop):
        own = range(part.start, part.stop)
        for place, position in zip(part.where.tolist(), own, strict=True):
            assert found[place] is None
            found[place] = (part.segment, part.source, position)
    assert None not in found
    return [entry for entry in found if entry]


def sources(*weights: float) -> tuple[Source, ...]:
    return tuple(Source(f"set-{i}", weight) for i, weight in enumerate(weights))


@given(
    weights=st.lists(st.floats(0.01, 5), min_size=1, max_size=4),
    start=st.integers(0, 3 * SLOTS),
    length=st.integers(0, 300),
    cut=st.integers(0, 300),
)
@settings(max_examples=40, deadline=None)
def test_a_mixture_is_a_pure_function_of_the_position(weights, start, length, cut):
    mixture = Mixture([Segment(0, sources(*weights))], seed=3)
    middle = start + min(cut, length)
    whole = stream(mixture, start, start + length)
    assert stream(mixture, start, middle) + stream(mixture, middle, start + length) == whole


def test_each_source_is_read_in_order_without_gaps_and_in_proportion():
    mixture = Mixture([Segment(0, sources(3, 1))], seed=0)
    read = stream(mixture, 0, 2 * SLOTS)
    for index, share in [(0, 0.75), (1, 0.25)]:
        own = [position for _, source, position in read if source == index]
        assert own == list(range(int(2 * SLOTS * share)))
    near = sum(source for _, source, _ in read[:1000])
    assert 180 < near < 320  # shuffled, not one block of each


@given(st.lists(st.floats(0.01, 9), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_tables_share_all_slots_within_one_of_the_exact_share(weights):
    table = MixtureTable(weights, seed=1)
    assert sum(table.counts) == SLOTS
    for count, weight in zip(table.counts, weights, strict=True):
        assert abs(count - weight / sum(weights) * SLOTS) < 1


@pytest.mark.parametrize("position", [0, 1, SLOTS - 1, SLOTS, SLOTS + 1, 3 * SLOTS + 77])
def test_what_was_read_before_a_position_is_counted_over_all_rounds_of_the_table(position):
    table = MixtureTable([3, 1, 2.5], seed=5)
    owners = table.sources(0, position)
    assert [table.before(index, position) for index in range(3)] == [int((owners == i).sum()) for i in range(3)]


def test_a_new_segment_continues_what_was_read_before_and_begins_what_is_new():
    first = Mixture([Segment(0, sources(1, 1))], seed=5)
    changed = Mixture(first.continued(1234, (Source("set-1", 2.0), Source("new", 1.0))), seed=5)
    again = Mixture(changed.continued(3000, (Source("set-0", 1.0), Source("set-1", 1.0))), seed=5)
    read = stream(again, 0, 5000)
    assert stream(first, 0, 1234) == read[:1234] and stream(changed, 0, 3000) == read[:3000]
    names = {(0, 0): "set-0", (0, 1): "set-1", (1, 0): "set-1", (1, 1): "new", (2, 0): "set-0", (2, 1): "set-1"}
    for name in ("set-0", "set-1", "new"):
        own = [position for segment, source, position in read if names[segment, source] == name]
        assert own == list(range(len(own)))  # nothing lost or repeated, even after an absence
    assert [Segment.decoded(segment.encoded()) for segment in again.segments] == list(again.segments)


def test_refused_weights():
    with pytest.raises(ConfigError, match="above 0"):
        Segment(0, sources(1, 0))
    with pytest.raises(ConfigError, match="would never be read"):
        MixtureTable([1, 1e-9], seed=0)
