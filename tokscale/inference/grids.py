"""Images for people: one labelled grid, whatever made the images."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from tokscale.base.files import atomic_write
from tokscale.base.shapes import Tensor, UInt8

_LINE = 11
_MARGIN = 6
_MOST_LINES = 4  # of a label; a caption may be of any length, a sheet may not
_MOST_PIXELS = 64 * 2**20  # of a sheet: 200 MB in memory
_LEAST_SIDE = 16
_PAPER = (226, 226, 226)  # grey, so that white images show their edges


def to_pil(pixels: UInt8[Tensor, "channels height width"]) -> Image.Image:
    """One image as a Pillow image: grey for 1 channel, RGB for 3, RGBA for 4."""
    array = rearrange(pixels.cpu(), "c h w -> h w c").numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def save_png(pixels: UInt8[Tensor, "channels height width"], path: Path) -> None:
    """Write one image, whole or not at all."""
    with atomic_write(path) as file:
        to_pil(pixels).save(file, format="PNG")


def labelled_grid(
    pixels: UInt8[Tensor, "batch channels height width"],
    labels: Sequence[str],
    *,
    columns: int = 0,
    side: int = 128,
    headers: Sequence[str] = (),
) -> Image.Image:
    """Images in rows with their captions below, each image scaled to `side` pixels along its longer side.

    Small images are enlarged without smoothing, so that what a model drew is what one sees. Nothing of the sheet
    grows with a label: it is cut after four lines. Of very many images each is shown smaller, and beyond 20,000 or so
    the last are left out.

    Args:
        pixels: The images.
        labels: One caption an image.
        columns: Images in a row; by default the layout nearest to a square.
        side: Width and height of an image on the sheet, in pixels.
        headers: What is common to the images of each column, one a column; none by default.
    """
    columns = columns or max(1, round(len(labels) ** 0.5))
    side, shown = _fitted(side, len(labels), columns)
    font = ImageFont.load_default(size=10)
    wrapped = [_wrapped(label, side, font) for label in labels[:shown]]
    text_height = _LINE * max(map(len, wrapped), default=0)
    cell_w, cell_h = side + _MARGIN, side + text_height + _MARGIN
    rows = -(-len(wrapped) // columns)
    above = [_wrapped(header, side, font) for header in headers]
    top = _MARGIN + (_LINE * max(map(len, above)) + _MARGIN if above else 0)
    sheet = Image.new("RGB", (columns * cell_w + _MARGIN, top + rows * cell_h), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(above):
        place = (_MARGIN + column * cell_w, _MARGIN)
        draw.multiline_text(place, "\n".join(lines), fill="black", font=font, spacing=1)
    for index, lines in enumerate(wrapped):
        x = _MARGIN + index % columns * cell_w
        y = top + index // columns * cell_h
        image = to_pil(pixels[index]).convert("RGB")
        longer = max(image.size)
        smooth = Image.Resampling.LANCZOS if longer > side else Image.Resampling.NEAREST
        wide, high = (max(1, round(length * side / longer)) for length in image.size)
        sheet.paste(image.resize((wide, high), smooth), (x + (side - wide) // 2, y + (side - high) // 2))
        draw.multiline_text((x, y + side + 1), "\n".join(lines), fill="black", font=font, spacing=1)
    return sheet


def _fitted(side: int, count: int, columns: int) -> tuple[int, int]:
    """The largest side up to `side` with which `count` labelled images fit on a sheet, and how many do."""
    cell = lambda side: (side + _MARGIN) * (side + _MOST_LINES * _LINE + _MARGIN)  # noqa: E731
    while side > _LEAST_SIDE and -(-count // columns) * columns * cell(side) > _MOST_PIXELS:
        side = max(side // 2, _LEAST_SIDE)
    rows = min(-(-count // columns), _MOST_PIXELS // (cell(side) * columns))
    return side, min(count, rows * columns)


def _wrapped(label: str, side: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """The first lines of a label, none wider than `side` pixels."""
    # Cut before anything is measured: measuring, too, takes its time with two megabytes.
    start = "".join(letter if letter.isprintable() else " " for letter in label[: side * _MOST_LINES])
    cut = " \u2026" if len(label) > len(start) else ""
    mean = max(font.getlength(start) / max(len(start), 1), 1.0)  # letters of some scripts are twice as wide
    width = max(min(max(side // 6, 8), int(side / mean)), 3)
    lines = textwrap.wrap(start + cut, width=width, max_lines=_MOST_LINES, placeholder=" \u2026")
    return [_clipped(line, side, font) for line in lines]


def _clipped(line: str, side: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    while line and font.getlength(line) > side:
        line = line[:-1]
    return line


def save_grid(
    pixels: UInt8[Tensor, "batch channels height width"], labels: Sequence[str], path: Path, **layout: Any
) -> None:
    """Write `labelled_grid` as a PNG, whole or not at all."""
    with atomic_write(path) as file:
        labelled_grid(pixels, labels, **layout).save(file, format="PNG")


def interleave(*groups: UInt8[Tensor, "batch channels height width"]) -> UInt8[Tensor, "all channels height width"]:
    """Images of several groups side by side: originals beside their reconstructions."""
    return rearrange(torch.stack(groups), "g b c h w -> (b g) c h w")
