"""What the rows of a table of weights stand for, so that a table of another size can take over those that it shares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

RowKind = Literal["words", "codes", "classes", "places", "line", "plane", "fresh"]


@dataclass(frozen=True)
class Rows:
    """Some consecutive rows of a weight."""

    what: RowKind
    """`words`, `codes` and `classes` are entries of a vocabulary; `places` are positions in a sequence, each for
    itself; a `line` or a `plane` covers an image, whatever its number of cells; `fresh` rows mean nothing elsewhere."""
    size: tuple[int, ...]
    """How many; of a plane, its height and width."""

    @property
    def count(self) -> int:
        """Rows of the weight."""
        count = 1
        for length in self.size:
            count *= length
        return count


RowsOf = Mapping[str, Sequence[Rows]]
"""By name of the weight, all its rows in order. Weights that are not named have the same shape in all models of their
width and depth."""


def matching(names: Sequence[str], meanings: Mapping[str, Sequence[Rows]]) -> dict[str, tuple[Rows, ...]]:
    """The rows of each weight whose name ends as one of `meanings` says.

    Args:
        names: Of the model's weights.
        meanings: By the end of a name, whole parts of it.
    """
    found = {}
    for name in names:
        for end, rows in meanings.items():
            if name == end or name.endswith(f".{end}"):
                found[name] = tuple(rows)
    return found
