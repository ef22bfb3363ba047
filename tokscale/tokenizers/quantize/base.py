"""What every trained quantizer gives."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tokscale.base.protocols import Collectives, current
from tokscale.base.shapes import Float, Int, Tensor

_ROWS = 8192
"""Rows compared with a codebook at a time: 16384 codes times this many distances are half a gigabyte."""


class Quantized(NamedTuple):
    """Features after quantization, and what training wants to know of it.

    A tuple, since DeepSpeed looks for a module's output in tuples, lists and dictionaries: only then does it bring an
    entry that ZeRO-3 has divided back for the backward pass.
    """

    vectors: Float[Tensor, "batch dim grid_h grid_w"]
    """What the codes stand for; the gradient passes to the features as if nothing had happened."""
    codes: Int[Tensor, "batch *code_shape"]
    parts: Mapping[str, Tensor] = {}
    """Losses by name."""
    weights: Mapping[str, float] = {}
    """Of the losses."""


class TrainedQuantizer(nn.Module, ABC):
    """A finite set of vectors that learns to stand for features. fp32 whatever the features are.

    Only `forward` may run where an engine divides parameters; the other methods are for whole ones.
    """

    num_tokens: int
    dim: int
    levels: int | None = None
    """Codes of one place, where that is an axis of the codes."""

    @abstractmethod
    def forward(self, features: Float[Tensor, "batch dim grid_h grid_w"]) -> Quantized:
        """Quantize for training; in training mode, moving averages move."""

    @abstractmethod
    def ids(self, features: Float[Tensor, "batch dim grid_h grid_w"]) -> Int[Tensor, "batch *code_shape"]:
        """Codes of features: deterministic."""

    @abstractmethod
    def lookup(self, codes: Int[Tensor, "batch *code_shape"]) -> Float[Tensor, "batch dim grid_h grid_w"]:
        """What codes stand for."""

    def usage(self, codes: Int[Tensor, "batch *code_shape"]) -> dict[str, Float[Tensor, ""]]:
        """How many codes a batch uses, over all ranks; see `codebook_usage`."""
        return codebook_usage(codes, self.num_tokens)

    def anneal(self, step: int) -> None:
        """Take note of the optimizer step."""
        del step


def straight_through(features: Float[Tensor, "*shape"], vectors: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The value of `vectors` with the gradient of `features`."""
    return features + (vectors - features).detach()


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """fp32 inside, whatever the caller has allowed: at 16384 codes distances lose their minimum in less."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def nearest(rows: Float[Tensor, "rows dim"], vectors: Float[Tensor, "vocab dim"]) -> Int[Tensor, "rows"]:
    """Index of the vector with the smallest Euclidean distance to each row."""
    offsets = vectors.square().sum(dim=1)
    # The rows' own lengths do not change which vector is nearest.
    return torch.cat([torch.addmm(offsets, part, vectors.T, alpha=-2).argmin(dim=1) for part in rows.split(_ROWS)])


def assigned(
    rows: Float[Tensor, "rows dim"], ids: Int[Tensor, "rows"], num_tokens: int
) -> Float[Tensor, "vocab dim+1"]:
    """Of the rows of each id on this rank: how many there are, and their sum.

    By matrix products rather than scattered additions, whose order, and so the last digit, is open on a GPU.
    """
    total = rows.new_zeros(num_tokens, rows.shape[1] + 1)
    for part, index in zip(rows.split(_ROWS), ids.split(_ROWS), strict=True):
        chosen = index == torch.arange(num_tokens, device=rows.device)[:, None]
        total += chosen.to(rows.dtype) @ F.pad(part, (1, 0), value=1.0)
    return total


def codebook_usage(codes: Int[Tensor, "batch *grid"], num_tokens: int) -> dict[str, Float[Tensor, ""]]:
    """How many codes this batch uses, over all ranks.

    Returns:
        `codebook_perplexity` (exp of the entropy of the code histogram), `codebook_used` (share of the codes that
        occur) and `codebook_dead` (number of codes that do not).
    """
    flat = codes.flatten().long()
    # Not `bincount`: a GPU would wait for the size of its result. Whole numbers add up alike in any order.
    counts = torch.zeros(num_tokens, device=flat.device).scatter_add_(
        0, flat, torch.ones(flat.shape, device=flat.device)
    )
    counts = current(Collectives).all_sum(counts)
    shares = counts / counts.sum()
    used = (counts > 0).float()
    return {
        "codebook_perplexity": torch.exp(torch.special.entr(shares).sum()),
        "codebook_used": used.mean(),
        "codebook_dead": num_tokens - used.sum(),
    }
