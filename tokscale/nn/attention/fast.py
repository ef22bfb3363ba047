"""Attention of image patterns in time proportional to what they see: the text densely, the image in pieces.

Each part is a fused call; their outputs are joined by their log-sum-exps. In the backward pass each part gets the
joint output and log-sum-exp, which makes its gradients exact shares of the whole (as in ring attention).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from tokscale.base.shapes import Float, Tensor
from tokscale.nn.attention.flash import flash, flash_backward
from tokscale.nn.attention.partition import Partition
from tokscale.nn.attention.pattern import AttentionPattern, FastPath


@dataclass(frozen=True)
class PartitionedAttention(FastPath):
    """All text, and the image cut into pieces, on the CPU."""

    pattern: AttentionPattern
    partition: Partition

    def refusal(self, length: int) -> str | None:
        """Only a causal image may end early: its queries never see what is appended to fill a piece."""
        layout = self.pattern.layout
        if not self.pattern.causal and length not in (layout.text, layout.seq):
            return "a bidirectional image must be whole"
        return None

    def pays(self, length: int) -> bool:
        """Measured on a CPU with AVX-512: an image of few pieces is cheaper under a mask."""
        return length > self.pattern.layout.text + 2.2 * self.partition.reach + 60

    def __call__(
        self,
        q: Float[Tensor, "batch heads seq dim_head"],
        k: Float[Tensor, "batch heads seq dim_head"],
        v: Float[Tensor, "batch heads seq dim_head"],
    ) -> Float[Tensor, "batch heads seq dim_head"]:
        """Text densely, image in pieces."""
        partition, layout, length = self.partition, self.pattern.layout, q.shape[2]
        if length <= layout.text:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.pattern.causal)
        unit = layout.grid_w * partition.row_multiple
        missing = -(length - layout.text) % unit
        if missing:  # a causal query never sees what is appended; `refusal` keeps others away
            q, k, v = (F.pad(tensor, (0, 0, 0, missing)) for tensor in (q, k, v))
        out = _TextAndImage.apply(q, k, v, layout.text, self.pattern.causal, partition)
        return out[:, :, :length]


class _TextAndImage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, text: int, causal: bool, partition: Partition) -> Tensor:
        batch, mask = q.shape[0], partition.mask(q, q.shape[2] - text)
        near, near_lse = flash(
            partition.queries(q[:, :, text:]),
            partition.keys(k[:, :, text:]),
            partition.keys(v[:, :, text:]),
            causal=partition.causal,
            mask=mask,
        )
        out, lse = partition.to_image(near, batch), partition.to_image(near_lse[..., None], batch)[..., 0]
        if text:
            near, near_lse = out, lse
            # The causal triangle over the text's keys leaves them all to the image's queries.
            out, lse = flash(q, k[:, :, :text], v[:, :, :text], causal=causal)
            joint = torch.logaddexp(lse[:, :, text:], near_lse)
            out[:, :, text:].lerp_(near, (near_lse - joint).exp_()[..., None].to(out.dtype))
            lse[:, :, text:] = joint
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.cut = text, causal, partition
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        (grad,) = gradients
        text, causal, partition = ctx.cut
        batch, mask = q.shape[0], partition.mask(q, q.shape[2] - text)
        near_dq, near_dk, near_dv = flash_backward(
            partition.queries(grad[:, :, text:]),
            partition.queries(q[:, :, text:]),
            partition.keys(k[:, :, text:]),
            partition.keys(v[:, :, text:]),
            partition.queries(out[:, :, text:]),
            partition.queries(lse[:, :, text:, None])[..., 0],
            causal=partition.causal,
            mask=mask,
        )
        dq, dk, dv = (
            partition.to_image(near_dq, batch),
            partition.scatter_add(near_dk, batch),
            partition.scatter_add(near_dv, batch),
        )
        if text:
            near_dq, near_dk, near_dv = dq, dk, dv
            dq, dk, dv = flash_backward(grad, q, k[:, :, :text], v[:, :, :text], out, lse, causal=causal)
            dq[:, :, text:] += near_dq
            dk, dv = torch.cat([dk, near_dk], dim=2), torch.cat([dv, near_dv], dim=2)
        return dq, dk, dv, None, None, None
