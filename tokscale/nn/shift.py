"""Token shift: part of the channels comes from the neighbours a token grew out of."""

import torch
import torch.nn.functional as F

from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.nn.attention.decode import DeviceStep
from tokscale.nn.layout import TokenLayout


def history_length(layout: TokenLayout) -> int:
    """How many positions back a shift reaches: one token of text, one row of the image."""
    return max(1, layout.grid_w)


def shift_tokens(
    x: Float[Tensor, "batch new dim"],
    layout: TokenLayout,
    *,
    offset: int | DeviceStep = 0,
    history: Float[Tensor, "batch reach half_dim"] | None = None,
) -> Float[Tensor, "batch new dim"]:
    """Replace channels of `x`, which holds positions `[offset, offset + new)`, or the one that only the device knows.

    Text: the first half comes from the previous token. Image: the first quarter from the token above, the second
    from the one to the left. Beyond an edge it is zeros. `history` holds the first half of the channels of the last
    `history_length` positions, before any shift; it is brought up to date in place.
    """
    new, half, quarter = x.shape[1], x.shape[2] // 2, x.shape[2] // 4
    reach = history_length(layout)
    moving, staying = x[..., :half], x[..., half:]
    if history is None:
        moving = F.pad(moving, (0, 0, reach, 0))
    else:
        moving = torch.cat([history, moving], dim=1)
        history.copy_(moving[:, -reach:])

    before = moving[:, reach - 1 : reach - 1 + new]
    if isinstance(offset, DeviceStep):
        if offset.in_text:
            return torch.cat([before, staying], dim=-1)
        edge = offset.once(("edge", layout, quarter), lambda: _edge(offset.position - layout.text, layout, quarter))
        neighbours = torch.cat([moving[:, :1, :quarter], before[..., quarter:]], dim=-1).masked_fill(edge, 0)
        return torch.cat([neighbours, staying], dim=-1)
    text = min(max(layout.text - offset, 0), new)
    if text == new:
        return torch.cat([before, staying], dim=-1)
    if new == 1:  # a step of decoding, where every small operation costs: no masks for one position
        row, column = divmod(offset - layout.text, layout.grid_w)
        top, left = moving[:, :1, :quarter], before[..., quarter:]
        above, beside = top if row else torch.zeros_like(top), left if column else torch.zeros_like(left)
        return torch.cat([above, beside, staying], dim=-1)
    position = torch.arange(offset + text, offset + new, device=x.device)[:, None] - layout.text
    top = moving[:, text:new, :quarter].masked_fill(position < layout.grid_w, 0)
    left = before[:, text:, quarter:].masked_fill(position % layout.grid_w == 0, 0)
    image = torch.cat([top, left], dim=-1)
    return torch.cat([torch.cat([before[:, :text], image], dim=1), staying], dim=-1)


def _edge(place: Int[Tensor, "1"], layout: TokenLayout, quarter: int) -> Bool[Tensor, "half_dim"]:
    """Where an image position has no neighbour: in the channels from above, and in those from the left."""
    top, left = place < layout.grid_w, place % layout.grid_w == 0
    return torch.cat([top.expand(quarter), left.expand(quarter)])
