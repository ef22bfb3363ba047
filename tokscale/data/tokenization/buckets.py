"""Aspect buckets: images sorted by their shape, each shape a data set of its own, so that a batch has one shape."""

from collections.abc import Mapping
from fractions import Fraction


def choose_bucket(width: int, height: int, buckets: Mapping[str, tuple[int, int]]) -> str:
    """The bucket whose crop keeps most of an image, the first of several: a function of these numbers alone.

    Args:
        width: Of the image, in pixels.
        height: Likewise.
        buckets: Rows and columns by name.
    """

    def kept(name: str) -> Fraction:
        rows, columns = buckets[name]
        across, down = width * rows, height * columns
        return Fraction(min(across, down), max(across, down))

    return max(buckets, key=kept)
