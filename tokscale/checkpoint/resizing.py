"""Weights of a model with another vocabulary, grid or caption length: which rows are taken over, and which begin anew.

Words are known by their text, codes only where the image tokenizer is the same. What covers an image is stretched over
the new grid, since a position means a place on it. The rest of a network does not depend on these sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokscale.base.rows import Rows, RowsOf

_ENTRIES = ("words", "codes", "classes")


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
        value = like.new_zeros(rows.count, *like.shape[1:])
        known = torch.zeros(rows.count, dtype=torch.bool)
        if below is None or part is None or rows.what == "fresh":
            return value, known
        if rows.what in ("line", "plane"):
            return _stretched(part, below.size, rows.size), known | True
        numbers = self._numbers(rows, below)
        known = numbers >= 0
        value[known] = part[numbers[known]]
        return value, known

    def _numbers(self, rows: Rows, below: Rows) -> Tensor:
        given = self.entries.get(rows.what, range(rows.count)) if rows.what in _ENTRIES else range(rows.count)
        numbers = torch.full((rows.count,), -1) if given is None else torch.tensor(list(given))
        return torch.where(numbers < below.count, numbers, -1)


def _placed(rows: Sequence[Rows]) -> dict[tuple[str, int], tuple[Rows, int]]:
    """By what they are and the how-manieth of that: the rows, and the first one's number."""
    found: dict[tuple[str, int], tuple[Rows, int]] = {}
    first = 0
    for part in rows:
        again = sum(what == part.what for what, _ in found)
        found[part.what, again] = (part, first)
        first += part.count
    return found


def _stretched(part: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Interpolated linearly, edges of the images upon each other."""
    if old == new:
        return part
    flat = part.reshape(*old, -1).float()
    if len(new) == 1:
        found = F.interpolate(rearrange(flat, "h d -> 1 d h"), size=new, mode="linear")
        return rearrange(found, "1 d h -> h d").reshape(-1, *part.shape[1:]).to(part.dtype)
    found = F.interpolate(rearrange(flat, "h w d -> 1 d h w"), size=new, mode="bilinear")
    return rearrange(found, "1 d h w -> (h w) d").reshape(-1, *part.shape[1:]).to(part.dtype)
