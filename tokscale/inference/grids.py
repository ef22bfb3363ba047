"""Pictures for people: one labelled grid, whatever made the pictures."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from tokscale.base.files import atomic_write
from tokscale.base.shapes import Tensor, UInt8

_LINE = 11
_MARGIN = 6
_PAPER = (226, 226, 226)  # grey, so that white pictures show their edges


def to_pil(pixels: UInt8[Tensor, "channels height width"]) -> Image.Image:
    """One picture as a Pillow image: grey for 1 channel, RGB for 3, RGBA for 4."""
    array = rearrange(pixels.cpu(), "c h w -> h w c").numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def save_png(pixels: UInt8[Tensor, "channels height width"], path: Path) -> None:
    """Write one picture, whole or not at all."""
    with atomic_write(path) as file:
        to_pil(pixels).save(file, format="PNG")


def labelled_grid(
    pixels: UInt8[Tensor, "batch channels height width"], labels: Sequence[str], *, columns: int = 0, side: int = 128
) -> Image.Image:
    """Pictures in rows with their captions below, each picture scaled to `side` pixels.

    Small pictures are enlarged without smoothing, so that what a model drew is what one sees.

    Args:
        pixels: The pictures.
        labels: One caption a picture.
        columns: Pictures in a row; by default the layout nearest to a square.
        side: Width and height of a picture on the sheet, in pixels.
    """
    columns = columns or max(1, round(len(labels) ** 0.5))
    font = ImageFont.load_default(size=10)
    wrapped = [textwrap.wrap(label, width=max(side // 6, 8)) for label in labels]
    text_height = _LINE * max(map(len, wrapped), default=0)
    cell_w, cell_h = side + _MARGIN, side + text_height + _MARGIN
    rows = -(-len(labels) // columns)
    sheet = Image.new("RGB", (columns * cell_w + _MARGIN, rows * cell_h + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, lines in enumerate(wrapped):
        x = _MARGIN + index % columns * cell_w
        y = _MARGIN + index // columns * cell_h
        picture = to_pil(pixels[index]).convert("RGB")
        smooth = Image.Resampling.LANCZOS if picture.width > side else Image.Resampling.NEAREST
        sheet.paste(picture.resize((side, side), smooth), (x, y))
        draw.multiline_text((x, y + side + 1), "\n".join(lines), fill="black", font=font, spacing=1)
    return sheet


def save_grid(
    pixels: UInt8[Tensor, "batch channels height width"], labels: Sequence[str], path: Path, **layout: int
) -> None:
    """Write `labelled_grid` as a PNG, whole or not at all."""
    with atomic_write(path) as file:
        labelled_grid(pixels, labels, **layout).save(file, format="PNG")


def interleave(*groups: UInt8[Tensor, "batch channels height width"]) -> UInt8[Tensor, "all channels height width"]:
    """Pictures of several groups side by side: originals beside their reconstructions."""
    return rearrange(torch.stack(groups), "g b c h w -> (b g) c h w")
