"""`conv_like`: all text, and a window of the image around the query."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange

from tokscale.base.errors import ConfigError
from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.nn.attention.fast import PartitionedAttention
from tokscale.nn.attention.kinds.grid import GridKind, columns_between, rows_between
from tokscale.nn.attention.pattern import AttentionPattern, FastPath, Neighbourhood, attention_kind
from tokscale.nn.attention.retention import Retention
from tokscale.nn.layout import TokenLayout

TILE = 8
"""Side of a tile that is aimed at: larger ones waste scores, smaller ones copy keys more often."""
LARGEST_TILE = 16
"""Beyond this a tile wastes more than a dense mask does."""


@attention_kind
class ConvLike(GridKind):
    """A window of `kernel_size` by `kernel_size`, every `dilation`-th position of it (arXiv:2102.12092, figure 11)."""

    name = "conv_like"
    backends = ("dense", "sdpa", "fast", "flex", "natten")

    def check(self, pattern: AttentionPattern) -> None:
        """The window of the original has a corner for its query, so no other direction."""
        if not pattern.causal and pattern.conv_window == "corner":
            raise ConfigError(
                "conv_window: 'corner' sees only what lies above and to the left, so it has no bidirectional form; "
                "use model.conv_window=centered, which is the whole centred window there"
            )

    def near(self, pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
        """Inside the window, and on its lattice."""
        down, right = rows_between(pattern, query, key), columns_between(pattern, query, key)
        reach = (pattern.kernel_size - 1) * pattern.dilation
        low, high = (0, reach) if pattern.conv_window == "corner" else (-(reach // 2), reach // 2)
        inside = (down >= low) & (down <= high) & (right >= low) & (right <= high)
        return inside & (down % pattern.dilation == 0) & (right % pattern.dilation == 0)

    def fast_path(self, pattern: AttentionPattern) -> FastPath | None:
        """Tiles with a rim, where some divide the grid."""
        tiles = _tiles(pattern)
        return None if tiles is None else PartitionedAttention(pattern, tiles)

    def retention(self, pattern: AttentionPattern) -> Retention:
        """The rows that the window reaches over."""
        return WindowRows(pattern.layout, pattern)

    def neighbourhood(self, pattern: AttentionPattern) -> Neighbourhood | None:
        """The original's window is NATTEN's causal one; a centred one is not."""
        if not pattern.causal or pattern.conv_window != "corner":
            return None
        return Neighbourhood(pattern.kernel_size, pattern.dilation)


def _tiles(pattern: AttentionPattern) -> "Tiles | None":
    layout = pattern.layout
    if layout.grid_h % pattern.dilation or layout.grid_w % pattern.dilation:
        return None
    reach = pattern.kernel_size - 1
    if pattern.conv_window == "corner":
        rim = (reach, 0, reach, 0)
    else:
        rim = (reach // 2, 0 if pattern.causal else reach // 2, reach // 2, reach // 2)
    height = _tile_side(layout.grid_h // pattern.dilation, max(rim[:2]))
    width = _tile_side(layout.grid_w // pattern.dilation, max(rim[2:]))
    return Tiles(pattern, height, width, rim) if height and width else None


@dataclass(frozen=True)
class Tiles:
    """Rectangles of queries with the keys they cover plus a rim, wide enough for every window of the rectangle.

    With a dilation the grid first falls apart into `dilation ** 2` interleaved grids that never see each other.
    """

    pattern: AttentionPattern
    height: int
    width: int
    """Of a tile, in positions of its interleaved grid."""
    rim: tuple[int, int, int, int]
    """Keys beyond the tile: above, below, left, right."""
    causal: bool = False

    @property
    def reach(self) -> int:
        """Positions of a tile and its rim."""
        above, below, left, right = self.rim
        return (self.height + above + below) * (self.width + left + right)

    @property
    def row_multiple(self) -> int:
        """Rows of a tile, in all interleaved grids."""
        return self.height * self.pattern.dilation

    def queries(self, image: Tensor) -> Tensor:
        """By interleaved grid, then by tile."""
        return rearrange(
            image,
            "b h (tr i dr tc j dc) d -> (b h) (dr dc tr tc) (i j) d",
            **self._sizes,
        )

    def to_image(self, pieces: Tensor, batch: int) -> Tensor:
        """Back to raster order."""
        return rearrange(pieces, "(b h) (dr dc tr tc) (i j) d -> b h (tr i dr tc j dc) d", b=batch, **self._sizes)

    def keys(self, image: Tensor) -> Tensor:
        """Each tile with its rim; zeros beyond the grid."""
        above, below, left, right = self.rim
        step = self.pattern.dilation
        grids = rearrange(image, "b h (r dr c dc) d -> (b h) dr dc r c d", c=self._columns, dr=step, dc=step)
        grids = F.pad(grids, (0, 0, left, right, above, below))
        tiles = grids.unfold(3, self.height + above + below, self.height)
        tiles = tiles.unfold(4, self.width + left + right, self.width)
        return rearrange(tiles, "bh dr dc tr tc d i j -> bh (dr dc tr tc) (i j) d")

    def scatter_add(self, pieces: Tensor, batch: int) -> Tensor:
        """Rims are added to the neighbours they lie in."""
        above, below, left, right = self.rim
        tiles = rearrange(
            pieces,
            "bh (dr dc tr tc) (i j) d -> bh dr dc tr tc i j d",
            dr=self.pattern.dilation,
            dc=self.pattern.dilation,
            tc=self._columns // self.width,
            i=self.height + above + below,
        )
        total = tiles.new_zeros(*tiles.shape[:5], self.height, self.width, tiles.shape[-1])
        # A tile's rim lies in its neighbours, at their facing edge.
        for source_i, target_i, from_rows, to_rows in _overlaps(above, self.height, below):
            for source_j, target_j, from_columns, to_columns in _overlaps(left, self.width, right):
                target = total[:, :, :, to_rows, to_columns, target_i, target_j]
                target += tiles[:, :, :, from_rows, from_columns, source_i, source_j]
        return rearrange(total, "(b h) dr dc tr tc i j d -> b h (tr i dr tc j dc) d", b=batch)

    def mask(self, like: Tensor, image: int) -> Tensor:
        """The pattern's own mask between the positions of each tile and of its rim."""
        return _tile_mask(self, image, str(like.device), like.dtype)

    @property
    def _columns(self) -> int:
        return self.pattern.layout.grid_w // self.pattern.dilation

    @property
    def _sizes(self) -> dict[str, int]:
        step = self.pattern.dilation
        return {"i": self.height, "j": self.width, "dr": step, "dc": step, "tc": self._columns // self.width}


def _tile_side(side: int, rim: int) -> int | None:
    """The divisor of `side` nearest to `TILE` that a rim does not exceed: a rim reaches one neighbour, no further."""
    fitting = [size for size in range(max(1, rim), min(side, LARGEST_TILE) + 1) if side % size == 0]
    return min(fitting, key=lambda size: abs(size - TILE), default=None)


def _overlaps(before: int, size: int, after: int) -> list[tuple[slice, slice, slice, slice]]:
    """Stretches along one axis of a tile with its rims: (in the tile, in its target, which tiles, which targets)."""
    return [
        (slice(before, before + size), slice(0, size), slice(None), slice(None)),
        (slice(0, before), slice(size - before, size), slice(1, None), slice(None, -1)),
        (slice(before + size, None), slice(0, after), slice(None, -1), slice(1, None)),
    ][: 3 if after else 2]


@lru_cache(maxsize=64)
def _tile_mask(tiles: Tiles, image: int, device: str, dtype: torch.dtype) -> Float[Tensor, "one pieces queries keys"]:
    with torch.inference_mode(False):
        places = torch.arange(1, image + 1, dtype=torch.float64)[None, None, :, None]  # 0 marks what pads the rim
        queries = tiles.queries(places)[0, :, :, None, 0].long() - 1
        keys = tiles.keys(places)[0, :, None, :, 0].long() - 1
        seen = _seen(tiles.pattern, queries, keys) & (keys >= 0)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
        return mask[None].to(device)


def _seen(pattern: AttentionPattern, queries: Int[Tensor, "*q"], keys: Int[Tensor, "*k"]) -> Bool[Tensor, "*shape"]:
    text, head = pattern.layout.text, torch.zeros((), dtype=torch.long)
    return pattern.mask_mod("cpu")(head, head, queries + text, keys + text)


@dataclass(frozen=True)
class WindowRows(Retention):
    """The last rows, as many as a window reaches over, in a ring."""

    layout: TokenLayout
    pattern: AttentionPattern

    @property
    def rows(self) -> int:
        """The own row and those above it in the window."""
        pattern = self.pattern
        reach = (pattern.kernel_size - 1) * pattern.dilation
        return min(pattern.layout.grid_h, 1 + (reach if pattern.conv_window == "corner" else reach // 2))

    @property
    def scratch(self) -> int:
        """A window."""
        return self.pattern.kernel_size**2

    def window(self, position: int, device: torch.device) -> Int[Tensor, "window"]:
        """By the mask itself."""
        return _window(self, position, str(device))


@lru_cache(maxsize=1 << 14)
def _window(retention: WindowRows, position: int, device: str) -> Int[Tensor, "window"]:
    pattern, past = retention.pattern, torch.arange(position + 1)
    text = pattern.layout.text
    seen = pattern.visible(torch.tensor([position + text]), past + text)[0, 0]
    with torch.inference_mode(False):
        return retention.slot(past[seen]).to(device)
