"""The prefetcher: in order, never further ahead than asked, errors where they belong, and it can be stopped."""

import threading
import time
from collections.abc import Iterator

import pytest

from tokscale.data.loading.prefetch import Prefetcher


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_items_come_in_order_and_end(depth):
    ahead = Prefetcher(iter(range(20)), depth)
    assert list(ahead) == list(range(20)) and list(ahead) == []


def test_it_works_ahead_only_as_far_as_asked():
    made = []

    def source() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    ahead = Prefetcher(source(), 3)
    deadline = time.monotonic() + 120
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(made) == 4 and ahead.ready == 3  # three wait, and one more is in the thread's hand
    ahead.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_is_raised_where_its_item_would_have_been(depth):
    def source() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    ahead = Prefetcher(source(), depth)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="gone"):
        next(ahead)


def test_closing_ends_the_thread_even_when_its_queue_is_full():
    for _ in range(5):
        ahead = Prefetcher(iter(range(1000)), 2, "closed here")
        next(ahead)
        ahead.close()
        with pytest.raises(StopIteration):
            next(ahead)
    assert "closed here" not in {thread.name for thread in threading.enumerate()}
