"""NATTEN's neighbourhood attention for kinds that say they are one. For GPUs, and optional.

Its causal window is exactly the original's convolution: the query at the corner, the grid's edge cutting neighbours
off. The text joins in as additional keys that every query sees.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from einops import rearrange

from tokscale.base.shapes import Float, Tensor
from tokscale.nn.attention.pattern import AttentionPattern


def natten_refusal(pattern: AttentionPattern) -> str | None:
    """Why NATTEN cannot compute this, or None."""
    if find_spec("natten") is None:
        return "the package natten is not installed (pip install 'tokscale[natten]')"
    window = pattern.parts.neighbourhood(pattern)
    if window is None:
        return "it computes only causal windows with the query in the corner, as with conv_window=corner"
    layout, span = pattern.layout, window.kernel_size * window.dilation
    if window.kernel_size < 2 or span > min(layout.grid_h, layout.grid_w):
        return f"its window of {span} tokens must fit a grid of {layout.grid_h}x{layout.grid_w}"
    return None


def natten_attention(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch heads seq dim_head"],
    v: Float[Tensor, "batch heads seq dim_head"],
    pattern: AttentionPattern,
) -> Float[Tensor, "batch heads seq dim_head"]:
    """The same function as `dense_attention` for a pattern with such a neighbourhood."""
    from natten import na2d  # pyright: ignore[reportMissingImports]  # optional; it brings its own kernels

    layout, text, length = pattern.layout, pattern.layout.text, q.shape[2]
    window = pattern.parts.neighbourhood(pattern)
    assert window is not None
    if length <= text:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    missing = layout.seq - length
    if missing:  # a causal query never sees what is appended
        q, k, v = (F.pad(tensor, (0, 0, 0, missing)) for tensor in (q, k, v))
    grids = [
        rearrange(tensor[:, :, text:], "b h (r c) d -> b r c h d", c=layout.grid_w).contiguous() for tensor in (q, k, v)
    ]
    beside = {}
    if text:
        names = ("additional_keys", "additional_values")
        parts = (rearrange(tensor[:, :, :text], "b h n d -> b n h d").contiguous() for tensor in (k, v))
        beside = dict(zip(names, parts, strict=True))
    image = na2d(*grids, kernel_size=window.kernel_size, dilation=window.dilation, is_causal=True, **beside)
    assert isinstance(image, torch.Tensor)
    image = rearrange(image, "b r c h d -> b h (r c) d")
    before = F.scaled_dot_product_attention(q[:, :, :text], k[:, :, :text], v[:, :, :text], is_causal=True)
    return torch.cat([before, image], dim=2)[:, :, :length]
