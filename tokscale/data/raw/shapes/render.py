"""Drawing a scene: flat colours on white, anti-aliased by supersampling."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import reduce

from tokscale.base.shapes import Bool, Float, Tensor, UInt8
from tokscale.data.raw.shapes.grammar import Scene, Thing

SIZE = 32
"""Default side of an image, in pixels."""
RADIUS = {"small": 4.0 / 32, "medium": 5.4 / 32, "large": 7.2 / 32}
"""Half the extent of a thing, as a fraction of the image's side. Areas grow by 1.8 from one size to the next."""
RGB = {
    "red": (225, 30, 35),
    "orange": (245, 125, 15),
    "yellow": (250, 220, 30),
    "green": (20, 150, 60),
    "cyan": (40, 200, 230),
    "blue": (35, 65, 215),
    "magenta": (215, 50, 205),
    "black": (25, 25, 25),
}
BACKGROUND = 255
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Placed:
    """A thing somewhere."""

    thing: Thing
    x: float
    """Its centre, as a fraction of the image's side from the left."""
    y: float
    """From the top."""
    scale: float = 1.0
    """Of its radius."""


def render(scene: Scene, size: int = SIZE) -> UInt8[Tensor, "channels height width"]:
    """Draw a scene as a square image of `size` pixels, 3 channels. The same scene gives the same bytes."""
    parts = zip(scene.things, scene.jitter, scene.centres(), strict=False)
    return render_things([Placed(thing, x, y, jitter.scale) for thing, jitter, (x, y) in parts], size)


def render_things(things: Sequence[Placed], size: int = SIZE) -> UInt8[Tensor, "channels height width"]:
    """Draw any number of things, the later over the earlier, as `render` does."""
    canvas = torch.full((3, size, size), float(BACKGROUND), dtype=torch.float64)
    for placed in things:
        x, y, radius = placed.x, placed.y, RADIUS[placed.thing.size] * placed.scale * size
        left, top = (max(0, math.floor(centre * size - radius)) for centre in (x, y))
        right, bottom = (min(size, math.ceil(centre * size + radius)) for centre in (x, y))
        cover = coverage(placed.thing.shape, radius, x * size - left, y * size - top, bottom - top, right - left)
        window = canvas[:, top:bottom, left:right]
        colour = torch.tensor(RGB[placed.thing.colour], dtype=torch.float64)[:, None, None]
        window += cover * (colour - window)
    return canvas.round().to(torch.uint8)


def coverage(
    shape: str, radius: float, x: float, y: float, height: int, width: int, supersampling: int = SUPERSAMPLING
) -> Float[Tensor, "height width"]:
    """The share of each pixel that a shape covers.

    Args:
        shape: A word of `grammar.SHAPES`.
        radius: Half its extent, in pixels.
        x: Its centre from the left edge of the window, in pixels.
        y: Its centre from the top edge of the window, in pixels.
        height: Rows of the window.
        width: Columns of the window.
        supersampling: Samples along each side of a pixel.
    """
    rows, columns = (
        (torch.arange(length * supersampling, dtype=torch.float64) + 0.5) / supersampling for length in (height, width)
    )
    inside = _inside(shape, ((columns - x) / radius)[None, :], ((rows - y) / radius)[:, None])
    return reduce(inside.double(), "(h a) (w b) -> h w", "mean", a=supersampling, b=supersampling)


def _inside(shape: str, u: Float[Tensor, "1 width"], v: Float[Tensor, "height 1"]) -> Bool[Tensor, "height width"]:
    """Membership in a shape on the square [-1, 1], v downwards.

    The proportions keep every pair of (shape, size) at least 6% of their energy apart after a blur of a pixel at the
    smallest image. The tightest pair is the circle and the square: the circle is a little smaller, so that its
    three areas fall between the square's three.
    """
    match shape:
        case "circle":
            return u * u + v * v <= 0.92**2
        case "square":
            return torch.maximum(u.abs(), v.abs()) <= 0.96
        case "triangle":
            return (v <= 0.9) & (u.abs() <= (v + 1) / 1.9)
        case "cross":
            return (torch.minimum(u.abs(), v.abs()) <= 0.29) & (torch.maximum(u.abs(), v.abs()) <= 1)
        case "ring":
            return (u * u + v * v <= 1) & (u * u + v * v >= 0.55**2)
        case "hourglass":
            return (v.abs() <= 0.96) & (u.abs() <= 0.96 * v.abs() + 0.04)
        case _:
            raise AssertionError(shape)
