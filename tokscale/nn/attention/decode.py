"""Incremental attention: what a pattern needs kept of the past, and one query against it.

Keys lie in one static buffer per layer: the text, then a scratch window, then the kept part of the picture in the
order in which this kind reads it. A step then reads one contiguous view; only column and convolution windows are
copied next to the text first, a few keys each. A `sparse` layer keeps everything, and beside it the blocks that the
row of blocks at hand sees, copied once a row. Nothing that a step reads grows with the picture, except for `full`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange

from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.nn.attention.pattern import AttentionPattern

T = TypeVar("T", int, Tensor)


@dataclass(frozen=True)
class Retention:
    """Which picture keys a pattern keeps, and where. Picture positions count from 0 here."""

    pattern: AttentionPattern

    @property
    def _rows(self) -> int:
        """Picture rows that are alive at once."""
        pattern = self.pattern
        if pattern.kind == "axial_row":
            return 1
        if pattern.kind == "conv_like":
            reach = (pattern.kernel_size - 1) * pattern.dilation
            return min(pattern.layout.grid_h, 1 + (reach if pattern.conv_window == "seed" else reach // 2))
        return pattern.layout.grid_h

    @property
    def slots(self) -> int:
        """Picture keys kept."""
        return self._rows * self.pattern.layout.grid_w

    @property
    def scratch(self) -> int:
        """Keys of the largest window that has to be copied next to the text."""
        if self.pattern.kind == "axial_col":
            return self.pattern.layout.grid_h
        return self.pattern.kernel_size**2 if self.pattern.kind == "conv_like" else 0

    def slot(self, position: T) -> T:
        """Where picture positions, one or many, are kept. Row-wise kinds reuse slots that none sees again."""
        width = self.pattern.layout.grid_w
        if self.pattern.kind == "axial_col":
            return position % width * self.pattern.layout.grid_h + position // width
        return position % max(1, self.slots)

    def first_kept(self, count: int) -> int:
        """Of the first `count` picture positions, the first one that a later query may see."""
        width = max(1, self.pattern.layout.grid_w)
        return max(0, (count // width - self._rows + 1) * width) if count else 0

    def window(self, position: int, device: torch.device) -> slice | Int[Tensor, "window"]:
        """Slots of the picture keys that the query at `position` sees, itself included."""
        width, height = self.pattern.layout.grid_w, self.pattern.layout.grid_h
        row, column = divmod(position, width)
        if self.pattern.kind == "axial_row":
            return slice(0, column + 1)
        if self.pattern.kind == "axial_col":
            return slice(column * height, column * height + row + 1)
        if self.pattern.kind == "conv_like":
            return _conv_window(self, position, str(device))
        return slice(0, position + 1)


@lru_cache(maxsize=1 << 14)
def _conv_window(retention: Retention, position: int, device: str) -> Int[Tensor, "window"]:
    pattern, past = retention.pattern, torch.arange(position + 1)
    text = pattern.layout.text
    seen = pattern.visible(torch.tensor([position + text]), past + text)[0, 0]
    with torch.inference_mode(False):
        return retention.slot(past[seen]).to(device)


class KeyValueCache:
    """The static buffers of one attention layer: keys and values of the text and of the retained picture."""

    def __init__(
        self, pattern: AttentionPattern, batch: int, dim_head: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.pattern = pattern
        self.retention = Retention(pattern)
        self._picture = pattern.layout.text + self.retention.scratch
        length = self._picture + self.retention.slots
        self.keys = torch.zeros(batch, pattern.heads, length, dim_head, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self._seen = _SeenBlocks(pattern, self.keys) if pattern.kind == "sparse" else None

    def extend(
        self,
        q: Float[Tensor, "batch heads new dim_head"],
        k: Float[Tensor, "batch heads new dim_head"],
        v: Float[Tensor, "batch heads new dim_head"],
        offset: int,
        key_mask: Bool[Tensor, "batch total"] | None = None,
    ) -> Float[Tensor, "batch heads new dim_head"]:
        """Append positions `[offset, offset + new)` and attend from them to everything visible so far."""
        if q.shape[-2] == 1 and key_mask is None:
            self._write(k, v, offset)
            if self._seen is not None:
                return self._seen.step(q, self.keys, self.values, offset)
            return self._step(q, offset)
        out = self._chunk(q, k, v, offset, key_mask)
        self.append(k, v, offset)
        return out

    def nbytes(self) -> int:
        """Memory held."""
        beside = self._seen.held if self._seen is not None else ()
        return sum(tensor.untyped_storage().nbytes() for tensor in (self.keys, self.values, *beside))

    def append(
        self, k: Float[Tensor, "batch heads new dim_head"], v: Float[Tensor, "batch heads new dim_head"], offset: int
    ) -> None:
        """Keep what later queries may see of positions `[offset, offset + new)`."""
        if self._seen is not None:
            self._seen.forget()
        self._write(k, v, offset)

    def _write(self, k: Tensor, v: Tensor, offset: int) -> None:
        text, stop = self.pattern.layout.text, offset + k.shape[-2]
        written = min(stop, text) - offset
        if written > 0:
            self.keys[:, :, offset : offset + written] = k[:, :, :written]
            self.values[:, :, offset : offset + written] = v[:, :, :written]
        first = max(offset, text + self.retention.first_kept(stop - 1 - text)) if stop > text else stop
        first = max(first, text)
        if first >= stop:
            return
        if stop - first == 1:
            slot = self._picture + self.retention.slot(first - text)
            self.keys[:, :, slot] = k[:, :, -1]
            self.values[:, :, slot] = v[:, :, -1]
            return
        slots = self._picture + self.retention.slot(torch.arange(first - text, stop - text, device=k.device))
        self.keys[:, :, slots] = k[:, :, first - offset :]
        self.values[:, :, slots] = v[:, :, first - offset :]

    def _step(self, q: Tensor, position: int) -> Tensor:
        """One query: a contiguous view of the text and of its window."""
        text = self.pattern.layout.text
        stop = position + 1
        if position >= text:
            window = self.retention.window(position - text, q.device)
            if isinstance(window, slice) and not self.retention.scratch:
                stop = text + window.stop
            else:
                stop = text + self._copy_window(window)
        return F.scaled_dot_product_attention(q, self.keys[:, :, :stop], self.values[:, :, :stop])

    def _copy_window(self, window: slice | Tensor) -> int:
        text = self.pattern.layout.text
        for buffer in (self.keys, self.values):
            picture = buffer[:, :, self._picture :]
            seen = picture[:, :, window] if isinstance(window, slice) else picture.index_select(2, window)
            buffer[:, :, text : text + seen.shape[2]] = seen
        return seen.shape[2]

    def _chunk(self, q: Tensor, k: Tensor, v: Tensor, offset: int, key_mask: Tensor | None) -> Tensor:
        """Several queries on top of a past, or a padded one: the pattern's mask over whatever is kept."""
        text, device = self.pattern.layout.text, q.device
        count = max(0, offset - text)
        past_picture = torch.arange(self.retention.first_kept(count), count, device=device)
        past = torch.cat([torch.arange(min(offset, text), device=device), past_picture + text])
        slots = torch.cat([past[: min(offset, text)], self._picture + self.retention.slot(past_picture)])
        queries = torch.arange(offset, offset + q.shape[-2], device=device)
        positions = torch.cat([past, queries])
        mask = self.pattern.visible(queries, positions)[None]
        if key_mask is not None:
            mask = mask & key_mask[:, None, None, positions]
        keys = torch.cat([self.keys.index_select(2, slots), k], dim=2)
        values = torch.cat([self.values.index_select(2, slots), v], dim=2)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


class _SeenBlocks:
    """For the steps of a `sparse` layer: the keys that one row of blocks sees, side by side.

    Made anew when a step comes to another row of blocks, or after anything but a step wrote. The blocks of a head that
    sees fewer than another are followed by keys that a mask hides.
    """

    def __init__(self, pattern: AttentionPattern, like: Float[Tensor, "batch heads total dim_head"]) -> None:
        self.pattern = pattern
        before = pattern.block_table("cpu").tril(-1).sum(dim=2).max()
        width = (int(before) + 1) * pattern.sparse.block
        self.held = tuple(like.new_zeros(*like.shape[:2], width, like.shape[3]) for _ in range(2))
        self._row = -1

    def forget(self) -> None:
        """What was copied may have been overwritten."""
        self._row = -1

    def step(
        self,
        q: Float[Tensor, "batch heads one dim_head"],
        keys: Float[Tensor, "batch heads total dim_head"],
        values: Float[Tensor, "batch heads total dim_head"],
        position: int,
    ) -> Float[Tensor, "batch heads one dim_head"]:
        """Attention of the query at `position`, whose own key is the last one written."""
        row, inside = divmod(position, self.pattern.sparse.block)
        before, mask = _blocks_before(self.pattern, row, str(q.device), q.dtype)
        past = 0 if before is None else before.shape[1]
        if row != self._row:
            self._copy(keys, values, row, before)
        else:
            for store, kept in zip((keys, values), self.held, strict=True):
                kept[:, :, past + inside] = store[:, :, position]
        stop = past + inside + 1
        shown = None if mask is None else mask[:, :, :, :stop]
        near, far = (kept[:, :, :stop] for kept in self.held)
        return F.scaled_dot_product_attention(q, near, far, attn_mask=shown)

    def _copy(self, keys: Tensor, values: Tensor, row: int, before: Tensor | None) -> None:
        block = self.pattern.sparse.block
        past = 0 if before is None else before.shape[1]
        for store, kept in zip((keys, values), self.held, strict=True):
            own = store[:, :, row * block : (row + 1) * block]
            kept[:, :, past : past + own.shape[2]] = own
            if before is not None:
                index = before[None, :, :, None].expand(len(store), -1, -1, store.shape[3])
                torch.gather(store, 2, index, out=kept[:, :, :past])
        self._row = row


@lru_cache(maxsize=1024)
def _blocks_before(
    pattern: AttentionPattern, row: int, device: str, dtype: torch.dtype
) -> tuple[Int[Tensor, "heads keys"] | None, Float[Tensor, "one heads one seen"] | None]:
    """Positions of the keys in earlier blocks that a row of blocks sees, for each head as many as for the busiest.

    And what is added to the scores, the row's own block included, where heads see different numbers of blocks.
    """
    with torch.inference_mode(False):
        table = pattern.block_table("cpu")[:, row, : row + 1]
        counts = table[:, :row].sum(dim=1)
        most = int(counts.max())
        order = table[:, :row].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        inside = torch.arange(pattern.sparse.block)
        places = rearrange(order[:, :, None] * pattern.sparse.block + inside, "h blocks inside -> h (blocks inside)")
        hidden = rearrange(torch.arange(most) >= counts[:, None], "h blocks -> h blocks 1")
        own = rearrange(~table[:, row:], "h 1 -> h 1 1")
        hidden = torch.cat([hidden, own], dim=1).expand(-1, -1, pattern.sparse.block)
        mask = None
        if hidden.any():
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)
            mask = rearrange(mask, "h blocks inside -> 1 h 1 (blocks inside)").to(device)
        return places.to(device) if most else None, mask
