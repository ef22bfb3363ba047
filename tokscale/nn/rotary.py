"""Rotary positions: one axis for the text, two for the image (the original's table)."""

import math
from functools import lru_cache

import torch
from einops import rearrange

from tokscale.base.shapes import Float, Tensor
from tokscale.nn.layout import TokenLayout

IMAGE_AS_TEXT = 8192.0
"""The place on the text axis where every image token stands: far from any text."""
TEXT_AS_IMAGE = -10.0
"""The row and column where every text token stands; the image's lie in [-1, 1]."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""By the value of `StackConfig.rotary_dtype`."""


@lru_cache(maxsize=32)
def rotary_table(
    layout: TokenLayout, dim_head: int, device: torch.device | str = "cpu", dtype: str = "fp32"
) -> Float[Tensor, "seq half_dim_head two"]:
    """Cosine and sine of the angle of every position and channel pair; pairs beyond the rotated ones are (1, 0).

    The channels are thirds: the text axis, the row, the column (20 channels each of 64). The table is neither a
    parameter nor a buffer: casting a module to bfloat16 would turn 8192 radians by up to a quarter turn, and an engine
    that casts what constructors make would do so silently.

    Args:
        layout: Of the positions.
        dim_head: Width of a head.
        device: Where the table is wanted.
        dtype: What the angles are rounded to before anything is computed of them; see `StackConfig.rotary_dtype`.
    """
    angles = rotary_angles(layout, dim_head, dtype)
    pad = dim_head // 2 - angles.shape[1]
    with torch.inference_mode(False):
        angles = torch.nn.functional.pad(angles, (0, pad))
        return torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).to(device)


def rotary_angles(layout: TokenLayout, dim_head: int, dtype: str = "fp32") -> Float[Tensor, "seq rotated_pairs"]:
    """The angle of every position and rotated channel pair: fp32 numbers, rounded to what `dtype` can hold."""
    return _angles(layout, dim_head).to(DTYPES[dtype]).float()


def _angles(layout: TokenLayout, dim_head: int) -> Float[Tensor, "seq rotated_pairs"]:
    # float32 throughout, with the original's own expressions: 8192 times a frequency shows its last bit.
    axis = dim_head // 3
    options = {"dtype": torch.float32, "device": "cpu"}
    exponents = torch.arange(0, axis, 2, device="cpu")[: axis // 2].to(torch.float32) / axis
    text_frequencies = 1.0 / (10000**exponents)
    grid_frequencies = torch.linspace(1.0, 5.0, axis // 2, **options) * math.pi

    along_text = torch.cat(
        [torch.arange(layout.text, **options), torch.full((layout.image,), IMAGE_AS_TEXT, **options)]
    )
    rows = torch.linspace(-1, 1, layout.grid_h, **options).repeat_interleave(layout.grid_w)
    columns = torch.linspace(-1, 1, layout.grid_w, **options).repeat(layout.grid_h)
    outside = torch.full((layout.text,), TEXT_AS_IMAGE, **options)
    return torch.cat(
        [
            torch.outer(along_text, text_frequencies),
            torch.outer(torch.cat([outside, rows]), grid_frequencies),
            torch.outer(torch.cat([outside, columns]), grid_frequencies),
        ],
        dim=1,
    )


def rotate(
    x: Float[Tensor, "batch seq heads dim_head"], table: Float[Tensor, "seq half_dim_head two"]
) -> Float[Tensor, "batch seq heads dim_head"]:
    """Turn each pair of neighbouring channels by its position's angle; computed in float32 at least.

    As a product of complex numbers, which is one pass over memory where no compiler joins several.
    """
    exact = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(rearrange(exact, "b n h (d two) -> b n h d two", two=2).contiguous())
    turned = torch.view_as_real(pairs * torch.view_as_complex(table.to(exact.dtype))[:, None])
    return rearrange(turned, "b n h d two -> b n h (d two)").to(x.dtype)


def rotate_by_parts(
    x: Float[Tensor, "batch seq heads dim_head"], table: Float[Tensor, "seq half_dim_head two"]
) -> Float[Tensor, "batch seq heads dim_head"]:
    """The same in real numbers, for a compiler, which knows no complex ones: equal but for the last digit."""
    exact = x if x.dtype == torch.float64 else x.float()
    first, second = exact.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table[:, None].to(exact.dtype).unbind(-1)
    turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)
