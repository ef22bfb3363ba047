"""Weights of a model with another vocabulary, grid or caption length: which rows are taken over, and which begin anew.

Words are known by their text, codes only where the image tokenizer is the same. What covers an image is stretched over
the new grid, since a position means a place on it. The rest of a network does not depend on these sizes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokscale.base.kinds import for_each
from tokscale.base.rows import RowKind, Rows, RowsOf


@dataclass(frozen=True)
class Resizing:
    """How the stored model and the new one differ."""

    own: RowsOf
    """Of the new model's weights."""
    stored: RowsOf
    """Of the stored model's weights."""
    entries: Mapping[str, Sequence[int] | None] = field(default_factory=dict)
    """For `words`, `codes` and `classes`: the stored number of each new entry, -1 where it has none; None when nothing
    is known of them. What is not given has the same numbers."""

    def changes(self, name: str) -> bool:
        """Whether a weight cannot be taken over as it is."""
        if name not in self.own or name not in self.stored:
            return False
        sizes = [[(rows.what, rows.size) for rows in side[name]] for side in (self.own, self.stored)]
        return sizes[0] != sizes[1] or any(rows.what in self.entries for rows in self.own[name])

    def resized(self, name: str, stored: Tensor) -> tuple[Tensor, Tensor]:
        """The new weight, and which of its rows have a value.

        Args:
            name: Of the weight.
            stored: The whole stored weight.
        """
        old = _placed(self.stored[name])
        values, known = [], []
        for key, (rows, _) in _placed(self.own[name]).items():
            below, first = old.get(key, (None, 0))
            part = stored[first : first + below.count] if below is not None else None
            value, has = self._part(rows, below, part, stored)
            values.append(value)
            known.append(has)
        return torch.cat(values), torch.cat(known)

    def _part(self, rows: Rows, below: Rows | None, part: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        if below is None or part is None:
            return _nothing(self, rows, rows, like)
        return _TAKE[rows.what](self, rows, below, part)


def _nothing(resizing: Resizing, rows: Rows, below: Rows, part: Tensor) -> tuple[Tensor, Tensor]:
    del resizing, below
    return part.new_zeros(rows.count, *part.shape[1:]), torch.zeros(rows.count, dtype=torch.bool)


def _same_numbers(resizing: Resizing, rows: Rows, below: Rows, part: Tensor) -> tuple[Tensor, Tensor]:
    value, known = _nothing(resizing, rows, below, part)
    count = min(rows.count, below.count)
    value[:count], known[:count] = part[:count], True
    return value, known


def _entries(resizing: Resizing, rows: Rows, below: Rows, part: Tensor) -> tuple[Tensor, Tensor]:
    given = resizing.entries.get(rows.what, range(rows.count))
    value, known = _nothing(resizing, rows, below, part)
    if given is not None:
        numbers = torch.tensor(list(given))
        known = (numbers >= 0) & (numbers < below.count)
        value[known] = part[numbers[known]]
    return value, known


def _stretched(resizing: Resizing, rows: Rows, below: Rows, part: Tensor) -> tuple[Tensor, Tensor]:
    del resizing
    return _interpolated(part, below.size, rows.size), torch.ones(rows.count, dtype=torch.bool)


_TAKE: Mapping[RowKind, Callable[[Resizing, Rows, Rows, Tensor], tuple[Tensor, Tensor]]] = for_each(
    RowKind,
    {
        "words": _entries,
        "codes": _entries,
        "classes": _entries,
        "places": _same_numbers,
        "line": _stretched,
        "plane": _stretched,
        "fresh": _nothing,
    },
)
"""How rows are taken over: the new ones, those stored of the same meaning, and their part of the stored weight."""


def _placed(rows: Sequence[Rows]) -> dict[tuple[str, int], tuple[Rows, int]]:
    """By what they are and the how-manieth of that: the rows, and the first one's number."""
    found: dict[tuple[str, int], tuple[Rows, int]] = {}
    first = 0
    for part in rows:
        again = sum(what == part.what for what, _ in found)
        found[part.what, again] = (part, first)
        first += part.count
    return found


def _interpolated(part: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Interpolated linearly, edges of the images upon each other."""
    if old == new:
        return part
    flat = part.reshape(*old, -1).float()
    if len(new) == 1:
        found = F.interpolate(rearrange(flat, "h d -> 1 d h"), size=new, mode="linear")
        return rearrange(found, "1 d h -> h d").reshape(-1, *part.shape[1:]).to(part.dtype)
    found = F.interpolate(rearrange(flat, "h w d -> 1 d h w"), size=new, mode="bilinear")
    return rearrange(found, "1 d h w -> (h w) d").reshape(-1, *part.shape[1:]).to(part.dtype)
