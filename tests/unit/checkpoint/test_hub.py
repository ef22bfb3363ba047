"""Sizes as model hubs write them."""

import pytest

from tokscale.base.errors import ConfigError
from tokscale.checkpoint.hub import parse_size


@pytest.mark.parametrize(
    ("size", "expected"), [(7, 7), ("7", 7), ("5GB", 5 * 10**9), (" 1.5 mb", 1_500_000), ("2KB", 2000)]
)
def test_sizes_are_read(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "0", "-1", "5GiB", "large", 0])
def test_other_sizes_are_refused(size):
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(size)
