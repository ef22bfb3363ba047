"""Incremental attention: what a pattern needs kept of the past, and one query against it.

Keys lie in one static buffer per layer: the text, then a scratch window, then the kept part of the image in the
order in which this kind reads it. A step then reads one contiguous view; only column and convolution windows are
copied next to the text first, a few keys each. A `sparse` layer keeps everything, and beside it the blocks that the
row of blocks at hand sees, copied once a row. Nothing that a step reads grows with the image, except for `full`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.nn.attention.pattern import AttentionPattern
from tokscale.nn.attention.sdpa import fused_attention

T = TypeVar("T")


@dataclass(frozen=True)
class DeviceStep:
    """Where one step of decoding stands, known to the device alone: the host does the same at each position.

    So a step can be captured once and replayed (`nn/replay.py`). It reads all keys that may lie within `reach`, under a
    mask, where a step at a position that the host knows reads those that it sees.
    """

    position: Int[Tensor, "1"]
    """Of the new entry, counted through the whole sequence."""
    reach: int
    """At least the number of positions up to this one, of the image or of the text."""
    in_text: bool = False
    """Whether it is a position of the text, which the host does know."""
    _known: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What follows from the position alone, made once for all layers; `key` says what it is."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


class KeyValueCache:
    """The static buffers of one attention layer: keys and values of the text and of the retained image.

    What is retained, and in which slot, is the kind's to say (`Retention`).
    """

    def __init__(
        self, pattern: AttentionPattern, batch: int, dim_head: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.pattern = pattern
        self.retention = pattern.parts.retention(pattern)
        self._image = pattern.layout.text + self.retention.scratch
        length = self._image + self.retention.slots
        self.keys = torch.zeros(batch, pattern.heads, length, dim_head, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self._seen = self.retention.step_keys(self.keys)

    def extend(
        self,
        q: Float[Tensor, "batch heads new dim_head"],
        k: Float[Tensor, "batch heads new dim_head"],
        v: Float[Tensor, "batch heads new dim_head"],
        offset: int | DeviceStep,
        key_mask: Bool[Tensor, "batch total"] | None = None,
    ) -> Float[Tensor, "batch heads new dim_head"]:
        """Append positions `[offset, offset + new)` and attend from them to everything visible so far."""
        if isinstance(offset, DeviceStep):
            assert key_mask is None
            return self._device_step(q, k, v, offset)
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
            slot = self._image + self.retention.slot(first - text)
            self.keys[:, :, slot] = k[:, :, -1]
            self.values[:, :, slot] = v[:, :, -1]
            return
        slots = self._image + self.retention.slot(torch.arange(first - text, stop - text, device=k.device))
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

    def _device_step(self, q: Tensor, k: Tensor, v: Tensor, step: DeviceStep) -> Tensor:
        text = self.pattern.layout.text
        stop = min(step.reach, text) if step.in_text else self._image + self.retention.front(step.reach)
        slot, mask = step.once(self.pattern, lambda: (self._slot_of(step), self._seen_by(step)[..., :stop]))
        self.keys.index_copy_(2, slot, k)
        self.values.index_copy_(2, slot, v)
        return fused_attention(q, self.keys[:, :, :stop], self.values[:, :, :stop], mask)

    def _slot_of(self, step: DeviceStep) -> Int[Tensor, "1"]:
        if step.in_text:
            return step.position
        return self._image + self.retention.slot(step.position - self.pattern.layout.text)

    def _seen_by(self, step: DeviceStep) -> Bool[Tensor, "1 heads_or_one 1 keys"]:
        """Which keys of the buffers the step's position sees; of the text's alone if it is one of the text."""
        text, position = self.pattern.layout.text, step.position
        if step.in_text:
            return self.pattern.visible(position, torch.arange(text, device=position.device))[None]
        held = self.retention.held(position[0] - text)
        written = (held >= 0) & (held <= position - text)
        places = F.pad(torch.where(written, held + text, -1), (self._image, 0), value=-1)
        places[:text] = torch.arange(text, device=position.device)
        return ((places >= 0) & self.pattern.visible(position, places.clamp(min=0)))[None]

    def _copy_window(self, window: slice | Tensor) -> int:
        text = self.pattern.layout.text
        for buffer in (self.keys, self.values):
            image = buffer[:, :, self._image :]
            seen = image[:, :, window] if isinstance(window, slice) else image.index_select(2, window)
            buffer[:, :, text : text + seen.shape[2]] = seen
        return seen.shape[2]

    def _chunk(self, q: Tensor, k: Tensor, v: Tensor, offset: int, key_mask: Tensor | None) -> Tensor:
        """Several queries on top of a past, or a padded one: the pattern's mask over whatever is kept."""
        text, device = self.pattern.layout.text, q.device
        count = max(0, offset - text)
        past_image = torch.arange(self.retention.first_kept(count), count, device=device)
        past = torch.cat([torch.arange(min(offset, text), device=device), past_image + text])
        slots = torch.cat([past[: min(offset, text)], self._image + self.retention.slot(past_image)])
        queries = torch.arange(offset, offset + q.shape[-2], device=device)
        positions = torch.cat([past, queries])
        mask = self.pattern.visible(queries, positions)[None]
        if key_mask is not None:
            mask = mask & key_mask[:, None, None, positions]
        keys = torch.cat([self.keys.index_select(2, slots), k], dim=2)
        values = torch.cat([self.values.index_select(2, slots), v], dim=2)
        return fused_attention(q, keys, values, mask)
