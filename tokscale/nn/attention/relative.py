"""Causal attention with a learned bias per head for every 2-D offset, and a null key that every query sees.

The scores of a long image are never held at once: rows of queries are taken in chunks, each with the keys it may see
and no others, and the backward pass computes a chunk's weights again. That skips the half of the square that a causal
mask throws away, and the bias is read from its table of `(2h - 1)(2w - 1)` offsets, forward and backward, without a
matrix of positions by positions per head.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch.autograd.function import once_differentiable

from tokscale.base.shapes import Float, Int, Tensor
from tokscale.nn.attention.decode import DeviceStep

OffsetIndex = Literal["raster", "sequence"]

_softmax_backward = torch.ops.aten._softmax_backward_data.default

CHUNK_SCORES = 1 << 19
"""Scores held at once: 2 MB in single precision, what a CPU keeps near."""
CHUNK_SCORES_CUDA = 1 << 25
"""On a GPU, where every chunk is a dozen launches: 128 MB."""


@dataclass(frozen=True)
class Places:
    """Where the positions of `[start, codes in raster order]` lie.

    `raster` places a code where it lies in the image, and the start token apart, with the table's last row for it.
    `sequence` is the original's: position `i` counts as the image's position `i`, so the start token takes the first
    code's place, all codes move by one, the last column of each row wraps to the next one, and the last position has
    none.
    """

    grid_h: int
    grid_w: int
    index: OffsetIndex = "raster"
    table: tuple[int, int] | None = None
    """The grid that the bias table is made for, where it is a larger one: for images of several shapes."""

    @property
    def table_grid(self) -> tuple[int, int]:
        """Rows and columns that the bias table is made for."""
        return self.table or (self.grid_h, self.grid_w)

    @property
    def rows(self) -> int:
        """Entries of a bias table: every 2-D offset, and one for the start token as a key."""
        height, width = self.table_grid
        return (2 * height - 1) * (2 * width - 1) + 1

    def over(self, grid: tuple[int, int]) -> "Places":
        """The same for another grid, which reads the same bias table."""
        same = grid == (self.grid_h, self.grid_w)
        return self if same else Places(*grid, self.index, None if grid == self.table_grid else self.table_grid)

    def offsets(self, device: torch.device | str = "cpu") -> Int[Tensor, "queries keys"]:
        """The table's row for every pair of positions."""
        return _offsets(self, str(device))


@lru_cache(maxsize=32)
def _offsets(places: Places, device: str) -> Int[Tensor, "queries keys"]:
    height, width = places.grid_h, places.grid_w
    with torch.inference_mode(False):
        place = torch.arange(height * width, device=device)
        row, column = place // width, place % width
        most_rows, most_columns = places.table_grid
        down = row[:, None] - row + most_rows - 1
        right = column[:, None] - column + most_columns - 1
        offsets = down * (2 * most_columns - 1) + right
        return F.pad(offsets, (1, 0, 1, 0), value=places.rows - 1) if places.index == "raster" else offsets


@lru_cache(maxsize=32)
def _offsets_with_null(places: Places, device: str) -> Int[Tensor, "queries keys"]:
    """The same with a column for the null key before them, and with one row for all keys that come later."""
    with torch.inference_mode(False):
        offsets = _offsets(places, device)
        later = torch.ones_like(offsets, dtype=torch.bool).triu(1)
        return F.pad(offsets.masked_fill(later, places.rows + 1), (1, 0), value=places.rows)


def relative_attention(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch kv_heads keys dim_head"],
    v: Float[Tensor, "batch kv_heads keys dim_head"],
    table: Float[Tensor, "offsets heads"],
    places: Places,
) -> Float[Tensor, "batch heads seq dim_head"]:
    """softmax(q k^T / sqrt(dim_head) + bias) v, the same function as `dense_relative_attention`.

    Args:
        q: Queries of positions `0 ... seq - 1`.
        k: Keys: the null one, then those of the same positions. One head serves several of the queries' (multi-query).
        v: Values, likewise.
        table: The bias of each offset, for each head.
        places: Where positions lie.
    """
    # Autocast ends at the door of a function with a backward pass of its own, which runs without it.
    k, v = k.to(q.dtype), v.to(q.dtype)
    return _Relative.apply(q, k, v, table, places)  # type: ignore[return-value]  # torch does not type `apply`


def dense_relative_attention(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch kv_heads keys dim_head"],
    v: Float[Tensor, "batch kv_heads keys dim_head"],
    table: Float[Tensor, "offsets heads"],
    places: Places,
) -> Float[Tensor, "batch heads seq dim_head"]:
    """The slow oracle: every score, one mask."""
    weights = dense_relative_weights(q, k, table, places)
    return torch.einsum("bhij,bhjd->bhid", weights.to(v.dtype), v.repeat_interleave(q.shape[1] // v.shape[1], dim=1))


def dense_relative_weights(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch kv_heads keys dim_head"],
    table: Float[Tensor, "offsets heads"],
    places: Places,
) -> Float[Tensor, "batch heads seq keys"]:
    """How much each query takes of each key, the null one first."""
    length = q.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    bias = rearrange(table[places.offsets(q.device)[:length, :length]], "i j h -> h i j")
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    bias = F.pad(bias.masked_fill(later, -torch.inf), (1, 0))
    scores = torch.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k) + bias
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))


def bias_row(table: Float[Tensor, "offsets heads"], places: Places, position: int) -> Float[Tensor, "1 heads 1 keys"]:
    """The bias of one query over the null key and the positions up to its own, for decoding step by step."""
    bias = rearrange(table[places.offsets(table.device)[position, : position + 1]], "j h -> 1 h 1 j")
    return F.pad(bias, (1, 0))


def bias_row_at(
    table: Float[Tensor, "offsets heads"], places: Places, step: DeviceStep, keys: int
) -> Float[Tensor, "1 heads 1 keys"]:
    """The same where the device alone knows the position: over the null key and `keys` positions, later ones -inf."""
    rows, biased, others = step.once(("bias", places, keys), lambda: _rows_at(places, step.position, keys))
    bias = rearrange(table.index_select(0, rows), "j h -> h j").where(biased, others.to(table.dtype))
    return rearrange(bias, "h j -> 1 h 1 j")


def _rows_at(places: Places, position: Tensor, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """The table's row for each key, which keys have one, and what the others are given: the null key 0, later -inf."""
    rows = F.pad(places.offsets(position.device)[:, :keys].index_select(0, position)[0], (1, 0))
    key = torch.arange(-1, keys, device=position.device)
    later = key > position
    return rows, (key >= 0) & ~later, torch.zeros(keys + 1, device=position.device).masked_fill(later, -torch.inf)


class _Relative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor, places: Places) -> Tensor:
        out, biases = torch.empty_like(q), _Biases(table, places)
        for start, stop in _chunks(q):
            weights = _weights(q, k, biases, start, stop)
            out[:, :, start:stop] = _heads(_by_group(weights.to(v.dtype), k) @ v[:, :, : stop + 1], q)
        ctx.save_for_backward(q, k, v, table)
        ctx.places = places
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, table = ctx.saved_tensors
        (grad,) = gradients
        biases, scale = _Biases(table, ctx.places), q.shape[-1] ** -0.5
        exact = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
        for start, stop in _chunks(q):
            rows, keys = slice(start, stop), slice(0, stop + 1)
            weights, given = _weights(q, k, biases, start, stop), _by_group(grad[:, :, rows], k)
            dv[:, :, keys] += _by_group(weights.to(v.dtype), k).mT @ given
            dweights = _heads(given @ v[:, :, keys].mT, q).to(exact)
            dscores = _softmax_backward(dweights, weights, -1, exact)
            biases.add_gradient(dscores, start, stop)
            grouped = _by_group(dscores.to(q.dtype), k)
            dq[:, :, rows] = _heads(grouped @ k[:, :, keys], q) * scale
            dk[:, :, keys] += grouped.mT @ _by_group(q[:, :, rows], k)
        return dq, (dk * scale).to(k.dtype), dv.to(v.dtype), biases.gradient().to(table.dtype), None


class _Biases:
    """What is added to the scores, read from the table: a null key has none, a key that comes later has -inf."""

    def __init__(self, table: Tensor, places: Places):
        exact = torch.promote_types(table.dtype, torch.float32)
        self.offsets = _offsets_with_null(places, str(table.device))
        rows = torch.zeros(table.shape[0] + 2, table.shape[1], dtype=exact, device=table.device)
        rows[:-2] = table
        rows[-1] = -torch.inf
        self.rows = rows.t().contiguous()
        self._gradient: Tensor | None = None

    def __call__(self, start: int, stop: int) -> Float[Tensor, "heads some keys"]:
        """Of queries `start ... stop - 1` over the null key and all positions up to the last of them."""
        places = self._places(start, stop)
        return self.rows.gather(1, places).unflatten(1, (stop - start, stop + 1))

    def add_gradient(self, dscores: Float[Tensor, "batch heads some keys"], start: int, stop: int) -> None:
        """Collect what the scores of a chunk say."""
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.rows)
        self._gradient.scatter_add_(1, self._places(start, stop), dscores.sum(0).flatten(1))

    def gradient(self) -> Float[Tensor, "offsets heads"]:
        """Of the table."""
        assert self._gradient is not None
        return self._gradient.t()[:-2]

    def _places(self, start: int, stop: int) -> Tensor:
        return repeat(self.offsets[start:stop, : stop + 1], "i j -> h (i j)", h=len(self.rows))


def _chunks(q: Tensor) -> list[tuple[int, int]]:
    length = q.shape[2]
    scores = CHUNK_SCORES_CUDA if q.device.type == "cuda" else CHUNK_SCORES
    size = min(max(scores // (q.shape[0] * q.shape[1] * (length + 1)), 16), length)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _weights(q: Tensor, k: Tensor, biases: _Biases, start: int, stop: int) -> Tensor:
    """Probabilities of queries `start ... stop - 1` over all keys up to the last, in single precision at least."""
    scores = _by_group(q[:, :, start:stop] * q.shape[-1] ** -0.5, k) @ k[:, :, : stop + 1].mT
    scores = _heads(scores, q).to(torch.promote_types(q.dtype, torch.float32))
    return scores.add_(biases(start, stop)).softmax(-1)


def _by_group(x: Tensor, k: Tensor) -> Tensor:
    """Rows of all heads that share a key head, as one matrix for it."""
    return rearrange(x, "b (kh g) i d -> b kh (g i) d", kh=k.shape[1])


def _heads(x: Tensor, q: Tensor) -> Tensor:
    return rearrange(x, "b kh (g i) d -> b (kh g) i d", g=q.shape[1] // x.shape[1])
