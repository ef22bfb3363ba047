"""Block-sparse attention on the CPU: each row of blocks against the blocks of keys it sees, and no others.

The diagonal blocks of all rows are one causal call. What lies beside the diagonal is gathered per row, needs no mask,
and is joined by log-sum-exp as in `fast.py`.
"""

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.autograd.function import once_differentiable

from tokscale.base.rng import seed_of
from tokscale.base.shapes import Bool, Float, Tensor
from tokscale.nn.attention.flash import flash, flash_backward
from tokscale.nn.attention.pattern import AttentionPattern, FastPath
from tokscale.nn.attention.sparsity import BlockGrid


@dataclass(frozen=True)
class _Rows:
    """For some heads of one layout: which blocks of keys each row of blocks sees beside the diagonal."""

    heads: tuple[int, ...]
    block: int
    columns: tuple[tuple[int, ...], ...]


def block_table(pattern: AttentionPattern, device: torch.device | str) -> Bool[Tensor, "heads blocks blocks"]:
    """Which block of keys each block of queries sees; the last block may be ragged."""
    return _block_table(pattern, str(device))


@lru_cache(maxsize=128)
def _block_table(pattern: AttentionPattern, device: str) -> Bool[Tensor, "heads blocks blocks"]:
    block = pattern.sparse.block
    grid = BlockGrid(
        blocks=-(-pattern.layout.seq // block),
        heads=pattern.heads,
        text_blocks=-(-pattern.layout.text // block),
        causal=pattern.causal,
    )
    stream = random.Random(seed_of(pattern.sparse.seed, "sparse", pattern.stream))
    with torch.inference_mode(False):
        return pattern.sparse.make(grid, stream).to(device)


@dataclass(frozen=True)
class BlockRows(FastPath):
    """A causal block layout, row of blocks by row of blocks, on the CPU."""

    pattern: AttentionPattern

    def refusal(self, length: int) -> str | None:
        """The diagonal blocks are causal calls."""
        del length
        return None if self.pattern.causal else "it computes only causal block layouts"

    def pays(self, length: int) -> bool:
        """Short sequences are cheaper under a mask."""
        return length >= max(300, 4 * self.pattern.sparse.block)

    def __call__(
        self,
        q: Float[Tensor, "batch heads seq dim_head"],
        k: Float[Tensor, "batch heads seq dim_head"],
        v: Float[Tensor, "batch heads seq dim_head"],
    ) -> Float[Tensor, "batch heads seq dim_head"]:
        """Heads with the same layout at once."""
        length, block = q.shape[2], self.pattern.sparse.block
        missing = -length % block
        if missing:  # a causal query never sees what is appended
            q, k, v = (F.pad(tensor, (0, 0, 0, missing)) for tensor in (q, k, v))
        groups = _groups(self.pattern, q.shape[2] // block)
        if len(groups) == 1:
            return _BlockRows.apply(q, k, v, groups[0])[:, :, :length]
        parts = [
            _BlockRows.apply(q[:, list(rows.heads)], k[:, list(rows.heads)], v[:, list(rows.heads)], rows)
            for rows in groups
        ]
        order = torch.tensor([head for rows in groups for head in rows.heads]).argsort()
        return torch.cat(parts, dim=1)[:, order, :length]


@lru_cache(maxsize=64)
def _groups(pattern: AttentionPattern, blocks: int) -> tuple[_Rows, ...]:
    """Heads with the same layout together."""
    by_columns: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for head, table in enumerate(block_table(pattern, "cpu")[:, :blocks, :blocks].tolist()):
        columns = tuple(tuple(column for column in range(row) if seen[column]) for row, seen in enumerate(table))
        by_columns.setdefault(columns, []).append(head)
    return tuple(_Rows(tuple(heads), pattern.sparse.block, columns) for columns, heads in by_columns.items())


class _BlockRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: _Rows) -> Tensor:
        batch = q.shape[0]
        diagonal = [_fold(tensor, rows.block) for tensor in (q, k, v)]
        folded_out, folded_lse = flash(*diagonal, causal=True)
        out = _unfold(folded_out, batch)
        lse = _unfold(folded_lse[..., None], batch)[..., 0]
        for (q_row, out_row, lse_row), keys, values, _ in _beside(rows, (q, out, lse), k, v):
            near, near_lse = flash(q_row, keys, values)
            joint = torch.logaddexp(lse_row, near_lse)
            out_row.lerp_(near, (near_lse - joint).exp_()[..., None].to(out.dtype))
            lse_row.copy_(joint)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rows = rows
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        (grad,), rows, batch = gradients, ctx.rows, q.shape[0]
        d_grad, d_q, d_k, d_v, d_out, d_lse = (
            _fold(tensor, rows.block) for tensor in (grad, q, k, v, out, lse[..., None])
        )
        folded = flash_backward(d_grad, d_q, d_k, d_v, d_out, d_lse[..., 0], causal=True)
        dq, dk, dv = (_unfold(tensor, batch).contiguous() for tensor in folded)
        dk_blocks, dv_blocks = (tensor.unflatten(2, (-1, rows.block)) for tensor in (dk, dv))
        for (grad_row, q_row, out_row, lse_row, dq_row), keys, values, columns in _beside(
            rows, (grad, q, out, lse, dq), k, v
        ):
            near_dq, near_dk, near_dv = flash_backward(grad_row, q_row, keys, values, out_row, lse_row)
            dq_row += near_dq
            dk_blocks.index_add_(2, columns, near_dk.unflatten(2, (-1, rows.block)))
            dv_blocks.index_add_(2, columns, near_dv.unflatten(2, (-1, rows.block)))
        return dq, dk, dv, None


def _beside(rows: _Rows, sliced: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Any:
    """Per row of blocks that sees more than its diagonal: its slices of `sliced`, keys, values, blocks of keys."""
    k_blocks, v_blocks = (tensor.unflatten(2, (-1, rows.block)) for tensor in (k, v))
    for row, chosen in enumerate(rows.columns):
        if chosen:
            columns = torch.tensor(chosen, device=k.device)
            here = slice(row * rows.block, (row + 1) * rows.block)
            yield (
                tuple(tensor[:, :, here] for tensor in sliced),
                k_blocks.index_select(2, columns).flatten(2, 3),
                v_blocks.index_select(2, columns).flatten(2, 3),
                columns,
            )


def _fold(tensor: Tensor, block: int) -> Tensor:
    return rearrange(tensor, "b h (n s) d -> (b h) n s d", s=block)


def _unfold(tensor: Tensor, batch: int) -> Tensor:
    return rearrange(tensor, "(b h) n s d -> b h (n s) d", b=batch)
