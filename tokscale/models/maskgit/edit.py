"""Changing images: the codes of a region are drawn anew, or a share of all codes again and again."""

from collections.abc import Mapping, Sequence

import torch
from einops import reduce

from tokscale.base.errors import ConfigError
from tokscale.base.protocols import ImageTokenizer
from tokscale.base.shapes import Bool, Int, Tensor, UInt8
from tokscale.models.maskgit.config import MaskGitSampling
from tokscale.models.maskgit.model import MaskGit


def cells(region: Bool[Tensor, "batch height width"], grid: tuple[int, int]) -> Bool[Tensor, "batch grid_h grid_w"]:
    """The codes whose part of the image a region touches.

    Raises:
        ConfigError: When the grid does not divide the image.
    """
    height, width = region.shape[1:]
    if height % grid[0] or width % grid[1]:
        raise ConfigError(f"region: {height} x {width} pixels do not divide into {grid[0]} x {grid[1]} codes")
    return reduce(region, "b (gh ph) (gw pw) -> b gh gw", "any", gh=grid[0], gw=grid[1])


def edit_images(
    model: MaskGit,
    tokenizer: ImageTokenizer,
    pixels: UInt8[Tensor, "batch channels height width"],
    region: Bool[Tensor, "batch height width"] | None,
    *,
    text: Int[Tensor, "batch text"],
    text_mask: Bool[Tensor, "batch text"],
    options: MaskGitSampling,
    seeds: Sequence[int],
    extra: Mapping[str, Tensor] | None = None,
) -> UInt8[Tensor, "batch channels height width"]:
    """Images with a region drawn anew for a caption, or edited without a mask.

    Args:
        model: Draws.
        tokenizer: The one its codes came from, for images of this size.
        pixels: The images.
        region: True where to draw (inpainting; for outpainting, all but the middle). Everywhere else the pixels stay
            as they are. None edits the whole image, with `sampling.edit_iterations`.
        text: Caption ids of what shall be seen, 0 where padded.
        text_mask: True at real tokens.
        options: How to draw.
        seeds: One per image.
        extra: See `MaskGit.generate_codes`.

    Raises:
        ConfigError: When the region does not fit, or nothing would change.
    """
    given = tokenizer.encode(pixels)
    redraw = None if region is None else cells(region, (given.shape[1], given.shape[2]))
    codes = model.generate_codes(text, text_mask, options=options, seeds=seeds, extra=extra, codes=given, redraw=redraw)
    drawn = tokenizer.decode(codes)
    return drawn if region is None else torch.where(region[:, None], drawn, pixels)
