"""The grammar of the built-in data set: what can be said about an image, and what is kept from training.

    a small red circle at the top left
    a small red circle left of a large blue square

Fixed before any recipe was tuned and pinned by `tests/contracts/test_shapes_grammar.py`: a measured prompt accuracy
means something only while the question stays the same.

A thing has a *look* (colour, shape) and a lone thing a *spot* (size, place). One in six looks and one in five spots
are held out: they never occur in the training split, alone or beside another thing, so a model that draws them has
composed them from parts.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch

from tokscale.base.errors import DataError
from tokscale.base.kinds import for_each
from tokscale.base.rng import generator

Split = Literal["train", "validation", "held_out"]
HOLDS_OUT = for_each(Split, {"train": False, "validation": False, "held_out": True})
"""Whether a split has the combinations that no other has."""
_T = TypeVar("_T")

SHAPES = ("circle", "square", "triangle", "cross", "ring", "hourglass")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "magenta", "black")
SIZES = ("small", "medium", "large")
PLACES = {
    f"{row} {column}".strip() if (row, column) != ("middle", "centre") else "centre": (x, y)
    for row, y in (("top", 0.25), ("middle", 0.5), ("bottom", 0.75))
    for column, x in (("left", 0.25), ("centre", 0.5), ("right", 0.75))
}
"""Place words to the centre `(x, y)` of a thing there, as fractions of the image's side from the top left."""
RELATIONS = {
    "left of": ((0.25, 0.5), (0.75, 0.5)),
    "right of": ((0.75, 0.5), (0.25, 0.5)),
    "above": ((0.5, 0.25), (0.5, 0.75)),
    "below": ((0.5, 0.75), (0.5, 0.25)),
}
"""Relation words to the centres of the first and the second thing."""

LOOKS = tuple(itertools.product(COLOURS, SHAPES))
SPOTS = tuple(itertools.product(SIZES, PLACES))
HELD_OUT_LOOKS = frozenset(
    {
        ("red", "ring"),
        ("orange", "hourglass"),
        ("yellow", "square"),
        ("green", "triangle"),
        ("cyan", "cross"),
        ("blue", "circle"),
        ("magenta", "square"),
        ("black", "triangle"),
    }
)
HELD_OUT_SPOTS = frozenset(
    {
        # Corners and the centre only: two-thing images use the four other places with every size.
        ("large", "top left"),
        ("small", "top right"),
        ("medium", "bottom left"),
        ("large", "bottom right"),
        ("small", "centre"),
    }
)
SEEN_LOOKS = tuple(look for look in LOOKS if look not in HELD_OUT_LOOKS)
SEEN_SPOTS = tuple(spot for spot in SPOTS if spot not in HELD_OUT_SPOTS)

PAIR_SHARE = 0.45
"""Share of images with two things."""
SHIFT = 1 / 64
"""Largest displacement of a centre along each axis, as a fraction of the image's side."""
STRETCH = 0.03
"""Largest relative change of a thing's radius."""


@dataclass(frozen=True)
class Thing:
    """What a caption says about one object."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Jitter:
    """How one object deviates from its canonical drawing: captions do not tell, so no two images are equal."""

    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Scene:
    """One thing at a place, or two things in a relation. Scenes that read alike are equal, whatever their jitter."""

    things: tuple[Thing, ...]
    place: str | None = None
    relation: str | None = None
    jitter: tuple[Jitter, ...] = field(default=(Jitter(), Jitter()), compare=False)

    def centres(self) -> list[tuple[float, float]]:
        """Centre of each thing as fractions of the image's side, jitter included."""
        canonical = [PLACES[self.place]] if self.place else RELATIONS[self.relation or ""]
        return [(x + shift.x, y + shift.y) for (x, y), shift in zip(canonical, self.jitter, strict=False)]

    def held_out(self) -> bool:
        """True when it holds a look or a spot that training never shows."""
        looks = any((thing.colour, thing.shape) in HELD_OUT_LOOKS for thing in self.things)
        return looks or (self.place is not None and (self.things[0].size, self.place) in HELD_OUT_SPOTS)


def caption(scene: Scene) -> str:
    """The one sentence for a scene."""
    if scene.place is not None:
        return f"{scene.things[0]} at the {scene.place}"
    first, second = scene.things
    return f"{first} {scene.relation} {second}"


_THING = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_ONE = re.compile(rf"{_THING} at the ({'|'.join(PLACES)})")
_TWO = re.compile(rf"{_THING} ({'|'.join(RELATIONS)}) {_THING}")


def parse(text: str) -> Scene:
    """The scene a caption describes: `caption(parse(text)) == text`.

    Raises:
        DataError: When the text is not a sentence of the grammar.
    """
    if match := _ONE.fullmatch(text):
        size, colour, shape, place = match.groups()
        return Scene((Thing(size, colour, shape),), place=place)
    if match := _TWO.fullmatch(text):
        *first, relation, size, colour, shape = match.groups()
        return Scene((Thing(*first), Thing(size, colour, shape)), relation=relation)
    raise DataError(
        f"{text!r} is not a caption of the shapes data set; say it like 'a small red circle at the top left' "
        "or 'a small red circle left of a large blue square'"
    )


def sample_scene(seed: int, index: int, split: Split = "train", *, things: int | None = None) -> Scene:
    """Scene number `index` of a split: a pure function of the arguments.

    Args:
        seed: Seed of the data set.
        index: Which image.
        split: `train` and `validation` draw from the seen combinations, `held_out` from scenes with at least one
            held-out look or spot.
        things: Ask for 1 or 2 things; by default `PAIR_SHARE` of the scenes have two. Two things never look the same.
    """
    for attempt in itertools.count():
        noise = torch.rand(16, dtype=torch.float64, generator=generator(seed, "shapes", split, index, attempt))
        scene = _scene(iter(noise.tolist()), whole=HOLDS_OUT[split], things=things)
        looks = {(thing.colour, thing.shape) for thing in scene.things}
        if scene.held_out() == HOLDS_OUT[split] and len(looks) == len(scene.things):
            return scene
    raise AssertionError("an endless count ended")


def evaluation_prompts(split: Literal["seen", "held_out"], count: int, seed: int = 0) -> list[str]:
    """`count` distinct captions to sample images for, alternating one and two things.

    Captions of seen combinations may occur in training; images made for them are new either way.
    """
    source: Split = "validation" if split == "seen" else "held_out"
    prompts: dict[str, None] = {}
    for index in itertools.count():
        if len(prompts) == count:
            break
        prompts[caption(sample_scene(seed, index, source, things=1 + len(prompts) % 2))] = None
    return list(prompts)


def _scene(noise: Iterator[float], *, whole: bool, things: int | None) -> Scene:
    def pick(options: tuple[_T, ...]) -> _T:
        return options[int(next(noise) * len(options))]

    def jitter() -> Jitter:
        x, y, scale = (2 * next(noise) - 1 for _ in range(3))
        return Jitter(SHIFT * x, SHIFT * y, 1 + STRETCH * scale)

    looks, spots = (LOOKS, SPOTS) if whole else (SEEN_LOOKS, SEEN_SPOTS)
    two = next(noise) < PAIR_SHARE
    if things == 2 or (things is None and two):
        first, second = (Thing(pick(SIZES), *pick(looks)) for _ in range(2))
        return Scene((first, second), relation=pick(tuple(RELATIONS)), jitter=(jitter(), jitter()))
    size, place = pick(spots)
    return Scene((Thing(size, *pick(looks)),), place=place, jitter=(jitter(),))
