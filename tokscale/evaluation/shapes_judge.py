"""Reading an image back into words: the judge behind prompt accuracy.

A matching pursuit. An image is white plus things: for every drawing of a thing (shape, size, colour, position) the
decrease of the squared error is a correlation, so the best explanation of the image is found exactly, first on whole
pixels, then on half pixels and small changes of scale. It is subtracted, and the rest is searched for another thing.
What no drawing explains well is nothing.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange

from tokscale.base.shapes import Float, Int, Tensor, UInt8
from tokscale.data.raw.shapes.grammar import COLOURS, PLACES, SHAPES, SIZES, Scene, parse
from tokscale.data.raw.shapes.render import BACKGROUND, RADIUS, RGB, SIZE, coverage

MIN_MATCH = 0.5
"""A thing is there when drawing it explains at least this share of its own energy."""
MIN_EXPLAINED = 0.7
"""An image is read when its things explain at least this share of all that is not background."""
MAX_THINGS = 3
"""One more than a scene of the data set can have, so that a superfluous thing is noticed."""

_REACH = 9
_WINDOW = 2 * _REACH + 1
# Scales, shifts and blurs (in pixels) of the drawings: a lossy decoder may give a softer image than the renderer.
_COARSE = ((1.0,), (0.0,), (0.8,))
_FINE = ((0.95, 1.0, 1.05), (-1.0, -0.5, 0.0, 0.5, 1.0), (0.0, 0.8))
_CHUNK = 64


@dataclass(frozen=True)
class SeenThing:
    """One object the judge sees."""

    size: str
    colour: str
    shape: str
    x: float
    """Centre as a fraction of the image's width."""
    y: float
    match: float
    """How well the drawing fits, 1 is perfectly."""

    @property
    def place(self) -> str:
        """The nearest place word."""
        return min(PLACES, key=lambda name: math.dist(PLACES[name], (self.x, self.y)))


@dataclass(frozen=True)
class Reading:
    """What the judge sees in an image, most prominent first. Empty: nothing."""

    things: tuple[SeenThing, ...]
    explained: float
    """Share of the image's deviation from the background that the things account for."""


@torch.no_grad()
def read_scenes(pixels: UInt8[Tensor, "batch channels height width"], most: int = MAX_THINGS) -> list[Reading]:
    """Read images of any size, at most `most` things in each; they are judged at 32 pixels."""
    readings: list[Reading] = []
    for chunk in pixels.split(_CHUNK):
        image = chunk.float()
        if image.shape[-2:] != (SIZE, SIZE):
            image = F.interpolate(image, (SIZE, SIZE), mode="bilinear", antialias=True)
        readings += _read(image - BACKGROUND, most)
    return readings


def score(prompts: Sequence[str], readings: Sequence[Reading]) -> dict[str, object]:
    """Prompt accuracy: the share of images that show what was asked for.

    Returns:
        For one thing `{"seen": {...}, "held_out": {...}}` with `exact`, `size`, `colour`, `shape`, `position` and
        `count`; for two things the same under `two_objects`, with `relation` in place of `position`. `exact` also
        asks that nothing else is in the image. A group without prompts is left out.
    """
    groups: dict[tuple[str, str], list[Mapping[str, bool]]] = {}
    for prompt, reading in zip(prompts, readings, strict=True):
        scene = parse(prompt)
        group = ("two_objects" if scene.relation else "one_object", "held_out" if scene.held_out() else "seen")
        groups.setdefault(group, []).append(compare(scene, reading))
    one: dict[str, object] = {}
    two: dict[str, object] = {}
    for (things, split), results in sorted(groups.items()):
        means: dict[str, float] = {key: sum(r[key] for r in results) / len(results) for key in results[0]}
        (one if things == "one_object" else two)[split] = means | {"count": len(results)}
    return {**one, "two_objects": two} if two else one


def compare(scene: Scene, reading: Reading) -> dict[str, bool]:
    """Which of the asked attributes an image shows.

    Where one thing was asked for, the most prominent one counts. Where two were asked for, both must be right, in the
    order of the two that agrees best; with fewer seen, no attribute is right.
    """
    if scene.relation is None:
        asked = scene.things[0]
        seen = reading.things[0] if reading.things else None
        parts = {key: seen is not None and getattr(seen, key) == getattr(asked, key) for key in _ATTRIBUTES}
        parts["position"] = seen is not None and seen.place == scene.place
        return {"exact": all(parts.values()) and len(reading.things) == 1} | parts
    pairs = itertools.permutations(reading.things[:2], 2)
    options = [_compare_pair(scene, (first, second)) for first, second in pairs]
    none_right = dict.fromkeys((*_ATTRIBUTES, "relation"), False)
    parts = max(options, key=lambda option: sum(option.values()), default=none_right)
    return {"exact": all(parts.values()) and len(reading.things) == 2} | parts


_ATTRIBUTES = ("size", "colour", "shape")


def _compare_pair(scene: Scene, pair: tuple[SeenThing, SeenThing]) -> dict[str, bool]:
    parts = {
        key: all(getattr(seen, key) == getattr(asked, key) for seen, asked in zip(pair, scene.things, strict=True))
        for key in _ATTRIBUTES
    }
    return {**parts, "relation": relation(*pair) == scene.relation}


def relation(first: SeenThing, second: SeenThing) -> str:
    """Where the first thing is, seen from the second: along the axis on which they are further apart."""
    across, down = second.x - first.x, second.y - first.y
    if abs(across) > abs(down):
        return "left of" if across > 0 else "right of"
    return "above" if down > 0 else "below"


@dataclass(frozen=True)
class _Bank:
    """Drawings in a window around their centre, and what they are."""

    cover: Float[Tensor, "drawings window window"]
    energy: Float[Tensor, "drawings"]
    shape: tuple[str, ...]
    size: tuple[str, ...]
    shift: tuple[tuple[float, float], ...]


@functools.cache
def _bank(scales: tuple[float, ...], shifts: tuple[float, ...], blurs: tuple[float, ...]) -> _Bank:
    """Every shape and size, with changes of scale, shifts in pixels, and blurs (standard deviation in pixels)."""
    drawings = list(itertools.product(SHAPES, SIZES, scales, shifts, shifts))
    middle = _WINDOW / 2
    sharp = torch.stack(
        [
            coverage(shape, RADIUS[size] * scale * SIZE, middle + dx, middle + dy, _WINDOW, _WINDOW)
            for shape, size, scale, dx, dy in drawings
        ]
    ).float()
    cover = torch.cat([_blurred(sharp, sigma) for sigma in blurs])
    shapes, sizes, _, across, down = zip(*(drawings * len(blurs)), strict=True)
    return _Bank(cover, cover.square().sum((1, 2)), shapes, sizes, tuple(zip(across, down, strict=True)))


def _colours() -> Float[Tensor, "colours channels"]:
    """What each colour adds to the background."""
    return torch.tensor([RGB[colour] for colour in COLOURS], dtype=torch.float32) - BACKGROUND


@functools.cache
def _faintest() -> float:
    """Energy of the drawing that changes the background least."""
    return float(_bank(*_FINE).energy.min() * _colours().square().sum(1).min())


def _blurred(cover: Float[Tensor, "drawings height width"], sigma: float) -> Float[Tensor, "drawings height width"]:
    if not sigma:
        return cover
    kernel = torch.exp(-torch.arange(-3.0, 4.0).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    return F.conv2d(cover[:, None], torch.outer(kernel, kernel)[None, None], padding=3)[:, 0]


def _read(rest: Float[Tensor, "batch channels height width"], most: int) -> list[Reading]:
    total = rest.square().sum((1, 2, 3))
    explained = torch.zeros_like(total)
    found: list[list[SeenThing]] = [[] for _ in range(len(rest))]
    active = torch.arange(len(rest))
    for _ in range(most):
        # A drawing explains no more than there is: what is fainter than half the faintest thing needs no search.
        visible = rest.square().sum((1, 2, 3)) >= MIN_MATCH * _faintest()
        active, rest = active[visible], rest[visible]
        if not len(active):
            break
        rest, gain, things = _explain(rest)
        there = torch.tensor([thing.match >= MIN_MATCH for thing in things], dtype=torch.bool)
        for index in there.nonzero().flatten().tolist():
            found[int(active[index])].append(things[index])
        active, rest, gain = active[there], rest[there], gain[there]
        explained[active] += gain
    share = (explained / total.clamp_min(1.0)).tolist()
    return [
        Reading(tuple(things) if part >= MIN_EXPLAINED else (), part) for things, part in zip(found, share, strict=True)
    ]


def _explain(
    rest: Float[Tensor, "batch channels height width"],
) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch"], list[SeenThing]]:
    """Find the drawing that explains most of each image; return what it leaves, what it explains, and itself."""
    colours = _colours()
    y, x = _locate(rest, colours)
    padded = F.pad(rest, [_REACH] * 4)
    rows, columns = (at[:, None] + torch.arange(_WINDOW) for at in (y, x))
    samples = torch.arange(len(rest))[:, None, None]
    window = padded[samples, :, rows[:, :, None], columns[:, None, :]]

    bank = _bank(*_FINE)
    fit = torch.einsum("bhwc,nhw,kc->bkn", window, bank.cover, colours)
    energy = colours.square().sum(1)[:, None] * bank.energy
    gain, best = rearrange(2 * fit - energy, "b k n -> b (k n)").max(1)
    colour, drawing = best // len(bank.energy), best % len(bank.energy)

    drawn = bank.cover[drawing][..., None] * colours[colour][:, None, None, :]
    padded[samples, :, rows[:, :, None], columns[:, None, :]] = window - drawn
    match = (gain / energy[colour, drawing]).tolist()
    things = [
        SeenThing(
            bank.size[d],
            COLOURS[c],
            bank.shape[d],
            (column + 0.5 + bank.shift[d][0]) / SIZE,
            (row + 0.5 + bank.shift[d][1]) / SIZE,
            fit,
        )
        for c, d, column, row, fit in zip(colour.tolist(), drawing.tolist(), x.tolist(), y.tolist(), match, strict=True)
    ]
    return padded[:, :, _REACH:-_REACH, _REACH:-_REACH], gain, things


def _locate(
    rest: Float[Tensor, "batch channels height width"], colours: Float[Tensor, "colours channels"]
) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]:
    """Row and column of the pixel on which the best drawing is centred."""
    bank = _bank(*_COARSE)
    planes = rearrange(rest, "b c h w -> (b c) 1 h w")
    fit = F.conv2d(planes, bank.cover[:, None], padding=_REACH)
    fit = rearrange(fit, "(b c) n h w -> b c n (h w)", b=len(rest))
    energy = colours.square().sum(1)[:, None] * bank.energy
    best = torch.full((len(rest), SIZE * SIZE), -math.inf)
    for index, colour in enumerate(colours):
        gain = 2 * torch.einsum("bcnp,c->bnp", fit, colour) - energy[index][:, None]
        best = torch.maximum(best, gain.amax(1))
    at = best.argmax(1)
    return at // SIZE, at % SIZE
