"""One function decides how attention is computed, and one calls it."""

from importlib.util import find_spec

import torch

from tokscale.base.errors import ConfigError
from tokscale.base.shapes import Bool, Float, Tensor
from tokscale.nn.attention.blocksparse import sparse_attention
from tokscale.nn.attention.fast import fast_attention
from tokscale.nn.attention.flex import block_attention
from tokscale.nn.attention.natten_backend import natten_attention, natten_refusal
from tokscale.nn.attention.pattern import AttentionPattern
from tokscale.nn.attention.pieces import pieces_for
from tokscale.nn.attention.reference import dense_attention
from tokscale.nn.attention.sdpa import sdpa_attention
from tokscale.nn.config import AttentionKind, Backend

_SERVES: dict[Backend, tuple[AttentionKind, ...]] = {
    "fast": ("axial_row", "axial_col", "conv_like", "sparse"),
    "natten": ("conv_like",),
}


def choose_backend(
    pattern: AttentionPattern,
    device: torch.device,
    dtype: torch.dtype,
    *,
    grad: bool,
    length: int,
    masked: bool = False,
    wanted: Backend | None = None,
) -> Backend:
    """The fastest backend that is exact here, or the `wanted` one.

    A wanted backend applies to the kinds it knows; the others are chosen for.

    Args:
        pattern: What is to be computed.
        device: Where.
        dtype: Of the queries.
        grad: Whether a backward pass will come.
        length: Positions in the sequence.
        masked: A key padding mask is given. `dense` and `sdpa` read it; in place of others `sdpa` is taken.
        wanted: The override from the configuration.

    Raises:
        ConfigError: When the wanted backend cannot do it; the message says why.
    """
    if wanted in ("dense", "sdpa"):
        return wanted
    if masked or (pattern.kind == "full" and wanted != "flex"):
        return "sdpa"
    if wanted is not None and pattern.kind in _SERVES.get(wanted, (pattern.kind,)):
        reason = _refusal(wanted, pattern, device, dtype, grad, length)
        if reason:
            raise ConfigError(f"attn_backend: {wanted!r} cannot compute {pattern.kind!r} here: {reason}; use auto")
        return wanted
    candidates: tuple[Backend, ...] = ("natten", "flex") if device.type == "cuda" else ("fast",)
    for candidate in candidates:
        pays = candidate != "fast" or _fast_pays(pattern, length)
        if pays and _refusal(candidate, pattern, device, dtype, grad, length) is None:
            return candidate
    return "sdpa"


def attend(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch heads seq dim_head"],
    v: Float[Tensor, "batch heads seq dim_head"],
    pattern: AttentionPattern,
    key_mask: Bool[Tensor, "batch seq"] | None = None,
    *,
    backend: Backend,
    stable: bool = False,
) -> Float[Tensor, "batch heads seq dim_head"]:
    """Attention over the visible keys by the named backend, which `choose_backend` found able."""
    match backend:
        case "dense":
            return dense_attention(q, k, v, pattern, key_mask, stable=stable)
        case "sdpa":
            return sdpa_attention(q, k, v, pattern, key_mask)
        case "fast":
            return (sparse_attention if pattern.kind == "sparse" else fast_attention)(q, k, v, pattern)
        case "flex":
            return block_attention(q, k, v, pattern)
        case "natten":
            return natten_attention(q, k, v, pattern)


def _refusal(
    backend: Backend, pattern: AttentionPattern, device: torch.device, dtype: torch.dtype, grad: bool, length: int
) -> str | None:
    """Why a backend cannot compute this pattern here, or None."""
    if backend == "natten":
        return "it needs a GPU" if device.type != "cuda" else natten_refusal(pattern)
    if backend == "flex":
        if device.type == "cpu" and grad:
            return "FlexAttention has no backward pass on the CPU"
        if device.type == "cuda" and find_spec("triton") is None:
            return "FlexAttention compiles with triton, which is not installed"
        return "FlexAttention has no float64" if dtype == torch.float64 else None
    if device.type != "cpu":
        return "its fused calls are the CPU's"
    if pattern.kind == "sparse":
        return None if pattern.causal else "it computes only causal block layouts"
    if not pattern.causal and length not in (pattern.layout.text, pattern.layout.seq):
        return "a bidirectional picture must be whole"
    return None if pieces_for(pattern) else "no tile fits its window and its grid"


def _fast_pays(pattern: AttentionPattern, length: int) -> bool:
    """Whether the fast path beats a dense mask, by measurements on a CPU with AVX-512 (`bench attention`)."""
    if pattern.kind == "sparse":
        return length >= max(300, 4 * pattern.sparse.block)
    pieces = pieces_for(pattern)
    return pieces is not None and length > pattern.layout.text + 2.2 * pieces.reach + 60
