"""How the picture part of a sparse pattern is cut into small dense problems: lines of the grid, or tiles with a rim."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange

from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.nn.attention.pattern import AttentionPattern

TILE = 8
"""Side of a tile that is aimed at: larger ones waste scores, smaller ones copy keys more often."""
LARGEST_TILE = 16
"""Beyond this a tile wastes more than a dense mask does."""


class Pieces(Protocol):
    """Attention inside the picture, as a batch of independent pieces.

    A picture is whole rows of the grid. Every key that a query sees in the picture is in the query's piece.
    """

    @property
    def causal(self) -> bool:
        """Within a piece, query i sees keys 0..i."""
        ...

    @property
    def reach(self) -> int:
        """Keys per piece."""
        ...

    def queries(self, picture: Float[Tensor, "batch heads image dim"]) -> Float[Tensor, "folded pieces queries dim"]:
        """Each position once, in the order of the pieces."""
        ...

    def picture(
        self, pieces: Float[Tensor, "folded pieces queries dim"], batch: int
    ) -> Float[Tensor, "batch heads image dim"]:
        """The inverse of `queries`."""
        ...

    def keys(self, picture: Float[Tensor, "batch heads image dim"]) -> Float[Tensor, "folded pieces keys dim"]:
        """The keys of each piece; a position may be in several."""
        ...

    def add_up(
        self, pieces: Float[Tensor, "folded pieces keys dim"], batch: int
    ) -> Float[Tensor, "batch heads image dim"]:
        """The adjoint of `keys`: every position gets the sum of its occurrences."""
        ...

    def mask(self, like: Tensor, image: int) -> Float[Tensor, "one pieces queries keys"] | None:
        """0 where a query of a piece sees a key, else -inf; None when every key is seen, or `causal` says it all."""
        ...


@dataclass(frozen=True)
class Lines:
    """Rows or columns of a grid: each is a sequence of its own."""

    height: int
    width: int
    along: str
    """`row` or `col`."""
    causal: bool

    @property
    def reach(self) -> int:
        """Length of a line."""
        return self.width if self.along == "row" else self.height

    def queries(self, picture: Tensor) -> Tensor:
        """By line."""
        to = "(b h) r c d" if self.along == "row" else "(b h) c r d"
        return rearrange(picture, f"b h (r c) d -> {to}", c=self.width)

    def picture(self, pieces: Tensor, batch: int) -> Tensor:
        """Back to raster order."""
        of = "(b h) r c d" if self.along == "row" else "(b h) c r d"
        return rearrange(pieces, f"{of} -> b h (r c) d", b=batch)

    keys = queries
    add_up = picture

    def mask(self, like: Tensor, image: int) -> None:
        """The causal flag says it all."""
        del like, image


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

    def queries(self, picture: Tensor) -> Tensor:
        """By interleaved grid, then by tile."""
        return rearrange(
            picture,
            "b h (tr i dr tc j dc) d -> (b h) (dr dc tr tc) (i j) d",
            **self._sizes,
        )

    def picture(self, pieces: Tensor, batch: int) -> Tensor:
        """Back to raster order."""
        return rearrange(pieces, "(b h) (dr dc tr tc) (i j) d -> b h (tr i dr tc j dc) d", b=batch, **self._sizes)

    def keys(self, picture: Tensor) -> Tensor:
        """Each tile with its rim; zeros beyond the grid."""
        above, below, left, right = self.rim
        step = self.pattern.dilation
        grids = rearrange(picture, "b h (r dr c dc) d -> (b h) dr dc r c d", c=self._columns, dr=step, dc=step)
        grids = F.pad(grids, (0, 0, left, right, above, below))
        tiles = grids.unfold(3, self.height + above + below, self.height)
        tiles = tiles.unfold(4, self.width + left + right, self.width)
        return rearrange(tiles, "bh dr dc tr tc d i j -> bh (dr dc tr tc) (i j) d")

    def add_up(self, pieces: Tensor, batch: int) -> Tensor:
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


def pieces_for(pattern: AttentionPattern) -> Pieces | None:
    """How to cut this pattern's picture, or None where no cut is worth it or fits."""
    layout = pattern.layout
    if pattern.kind in ("axial_row", "axial_col"):
        return Lines(layout.grid_h, layout.grid_w, pattern.kind.removeprefix("axial_"), pattern.causal)
    if pattern.kind != "conv_like" or layout.grid_h % pattern.dilation or layout.grid_w % pattern.dilation:
        return None
    reach = pattern.kernel_size - 1
    if pattern.conv_window == "seed":
        rim = (reach, 0, reach, 0)
    else:
        rim = (reach // 2, 0 if pattern.causal else reach // 2, reach // 2, reach // 2)
    height = _tile_side(layout.grid_h // pattern.dilation, max(rim[:2]))
    width = _tile_side(layout.grid_w // pattern.dilation, max(rim[2:]))
    return Tiles(pattern, height, width, rim) if height and width else None


def row_multiple(pieces: Pieces) -> int:
    """Pieces need a picture of this many rows, or a multiple."""
    return pieces.height * pieces.pattern.dilation if isinstance(pieces, Tiles) else 1


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


@lru_cache(maxsize=16)
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
