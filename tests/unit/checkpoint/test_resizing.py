"""Rows of a table that goes on under another vocabulary, caption length or grid."""

import pytest
import torch

from tokscale.base.rows import Rows, matching
from tokscale.checkpoint.resizing import Resizing


def table(*parts: Rows) -> torch.Tensor:
    """Row n holds n."""
    return torch.arange(float(sum(part.count for part in parts)))[:, None].expand(-1, 3)


def resized(own: tuple[Rows, ...], stored: tuple[Rows, ...], **entries) -> list[float | None]:
    value, known = Resizing({"t": own}, {"t": stored}, entries).resized("t", table(*stored))
    assert value.shape == (sum(part.count for part in own), 3)
    return [row[0].item() if has else None for row, has in zip(value, known, strict=True)]


def test_entries_follow_their_words_and_places_their_numbers():
    old, new = (Rows("words", (4,)), Rows("places", (2,))), (Rows("words", (5,)), Rows("places", (3,)))
    assert resized(new, old, words=[0, 3, -1, 1, -1]) == [0, 3, None, 1, None, 4, 5, None]
    assert resized(old, new, words=[0, 4, 2, 1]) == [0, 4, 2, 1, 5, 6]
    assert resized(new, old) == [0, 1, 2, 3, None, 4, 5, None], "the same numbers where nothing else is known"
    assert resized(new, old, words=None) == [None] * 5 + [4, 5, None], "nothing of a vocabulary that nobody knows"


def test_codes_of_several_levels_stay_in_their_levels():
    old, new = (Rows("codes", (2,)),) * 2, (Rows("codes", (2,)),) * 3
    assert resized(new, old) == [0, 1, 2, 3, None, None]
    assert resized(old, old, codes=None) == [None] * 4


def test_what_covers_an_image_is_stretched_over_the_new_grid():
    assert resized((Rows("line", (4,)),), (Rows("line", (2,)),)) == [0, 0.25, 0.75, 1]
    assert resized((Rows("line", (2,)),), (Rows("line", (4,)),)) == [0.5, 2.5]
    plane = resized((Rows("plane", (2, 4)),), (Rows("plane", (2, 2)),))
    assert plane == [0, 0.25, 0.75, 1, 2, 2.25, 2.75, 3]
    assert resized((Rows("plane", (3, 3)),), (Rows("plane", (3, 3)),)) == list(range(9))
    assert resized((Rows("fresh", (2,)),), (Rows("fresh", (3,)),)) == [None, None]


def test_only_what_differs_is_touched():
    rows = {"a": (Rows("words", (3,)),), "b": (Rows("line", (3,)),)}
    other = {"a": (Rows("words", (3,)),), "b": (Rows("line", (4,)),)}
    assert [Resizing(rows, other).changes(name) for name in ("a", "b", "c")] == [False, True, False]
    assert Resizing(rows, rows, {"words": [2, 1, 0]}).changes("a")


def test_a_name_is_found_by_its_last_parts():
    meanings = {"emb.weight": [Rows("words", (3,))]}
    assert list(matching(["x.emb.weight", "emb.weight", "text_emb.weight", "emb.weight.x"], meanings)) == [
        "x.emb.weight",
        "emb.weight",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_keep_their_type(dtype):
    made, _ = Resizing({"t": (Rows("line", (3,)),)}, {"t": (Rows("line", (2,)),)}).resized(
        "t", torch.ones(2, 4).to(dtype)
    )
    assert made.dtype == dtype and torch.equal(made, torch.ones(3, 4, dtype=dtype))
