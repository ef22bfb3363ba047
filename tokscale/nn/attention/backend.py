"""One function decides how attention is computed, and one calls it."""

from importlib.util import find_spec
from typing import assert_never

import torch

from tokscale.base.errors import ConfigError
from tokscale.base.shapes import Bool, Float, Tensor
from tokscale.nn.attention.flex import block_attention
from tokscale.nn.attention.natten_backend import natten_attention, natten_refusal
from tokscale.nn.attention.pattern import AttentionPattern, Backend
from tokscale.nn.attention.reference import dense_attention
from tokscale.nn.attention.sdpa import sdpa_attention


def choose_backend(
    pattern: AttentionPattern,
    device: torch.device,
    dtype: torch.dtype,
    *,
    grad: bool,
    length: int,
    masked: bool = False,
    backend_override: Backend | None = None,
) -> Backend:
    """The fastest backend that is exact here, or the `backend_override`.

    An override applies to the kinds it knows; the others are chosen for.

    Args:
        pattern: What is to be computed.
        device: Where.
        dtype: Of the queries.
        grad: Whether a backward pass will come.
        length: Positions in the sequence.
        masked: A key padding mask is given. `dense` and `sdpa` read it; in place of others `sdpa` is taken.
        backend_override: The override from the configuration.

    Raises:
        ConfigError: When the override cannot do it; the message says why.
    """
    if backend_override in ("dense", "sdpa"):
        return backend_override
    if masked or (pattern.parts.is_full and backend_override != "flex"):
        return "sdpa"
    if backend_override is not None and backend_override in pattern.parts.backends:
        reason = _refusal(backend_override, pattern, device, dtype, grad, length)
        if reason:
            raise ConfigError(
                f"attn_backend: {backend_override!r} cannot compute {pattern.kind!r} here: {reason}; use auto"
            )
        return backend_override
    candidates: tuple[Backend, ...] = ("natten", "flex") if device.type == "cuda" else ("fast",)
    for candidate in candidates:
        if candidate not in pattern.parts.backends or (candidate == "fast" and not _fast_pays(pattern, length)):
            continue
        if _refusal(candidate, pattern, device, dtype, grad, length) is None:
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
            path = pattern.parts.fast_path(pattern)
            assert path is not None
            return path(q, k, v)
        case "flex":
            return block_attention(q, k, v, pattern)
        case "natten":
            return natten_attention(q, k, v, pattern)
        case _:
            assert_never(backend)


def _refusal(
    backend: Backend, pattern: AttentionPattern, device: torch.device, dtype: torch.dtype, grad: bool, length: int
) -> str | None:
    """Why a backend cannot compute this pattern here, or None."""
    match backend:
        case "dense" | "sdpa":
            return None
        case "natten":
            return "it needs a GPU" if device.type != "cuda" else natten_refusal(pattern)
        case "flex":
            if device.type == "cpu" and grad:
                return "FlexAttention has no backward pass on the CPU"
            if device.type == "cuda" and find_spec("triton") is None:
                return "FlexAttention compiles with triton, which is not installed"
            return "FlexAttention has no float64" if dtype == torch.float64 else None
        case "fast":
            if device.type != "cpu":
                return "its fused calls are the CPU's"
            path = pattern.parts.fast_path(pattern)
            return "no tile fits its window and its grid" if path is None else path.refusal(length)
        case _:
            assert_never(backend)


def _fast_pays(pattern: AttentionPattern, length: int) -> bool:
    path = pattern.parts.fast_path(pattern)
    return path is not None and path.pays(length)
