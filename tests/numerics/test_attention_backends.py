"""Every way of computing attention against the dense oracle in float64: outputs and gradients.

The table is kinds x direction x sequence length x padding mask x backend, and each dtype once.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tokscale.base.errors import ConfigError
from tokscale.nn.attention import pattern as attention
from tokscale.nn.attention.backend import attend, choose_backend
from tokscale.nn.attention.pattern import AttentionPattern
from tokscale.nn.attention.reference import dense_attention
from tokscale.nn.attention.sparsity import DenseLayout, FixedLayout, LocalSlidingWindowLayout, VariableLayout
from tokscale.nn.layout import TokenLayout

CPU = torch.device("cpu")
BATCH, HEADS, DIM = 2, 4, 8


VARIANTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "conv_like": [
        ("3", {"kernel_size": 3}),
        ("5", {"kernel_size": 5}),
        ("3-dilated", {"kernel_size": 3, "dilation": 2}),
        ("3-centered", {"kernel_size": 3, "conv_window": "centered"}),
        ("3-centered-dilated", {"kernel_size": 3, "dilation": 2, "conv_window": "centered"}),
    ],
    "sparse": [
        ("variable", {"sparse": VariableLayout(block=4)}),
        ("per-head", {"sparse": VariableLayout(block=4, different_layout_per_head=True)}),
        ("fixed", {"sparse": FixedLayout(block=8, num_local_blocks=2)}),
        ("local", {"sparse": LocalSlidingWindowLayout(block=8)}),
        ("dense", {"sparse": DenseLayout(block=16)}),
    ],
}
"""Kinds that read options, with a few of them; the others as they are."""


@dataclass(frozen=True)
class Kind:
    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def has(self, causal: bool) -> bool:
        try:
            AttentionPattern(self.kind, LAYOUTS["text+image"], causal, **self.options)
        except ConfigError:
            return False
        return True


LAYOUTS = {"text+image": TokenLayout(7, 8, 12), "image": TokenLayout(0, 8, 4)}
KINDS = [
    Kind(f"{kind}{variant and '-'}{variant}", kind, options)
    for kind in attention.KINDS
    for variant, options in VARIANTS.get(kind, [("", {})])
]


def make(kind: Kind, layout: TokenLayout, causal: bool) -> AttentionPattern:
    return AttentionPattern(kind.kind, layout, causal, HEADS, **kind.options)


def has_fast_path(pattern: AttentionPattern) -> bool:
    return pattern.parts.fast_path(pattern) is not None


def values_and_gradients(run: Callable[..., torch.Tensor], length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (
        torch.randn(BATCH, HEADS, length, DIM, dtype=torch.float64, generator=generator) for _ in range(4)
    )
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v)]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(dtype))]


def worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    assert all(torch.isfinite(tensor).all() for tensor in found)
    pairs = zip(found, expected, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max().clamp(min=0.1)).item() for a, b in pairs)


CASES = [
    pytest.param(kind, layout, causal, id=f"{kind.name}-{'causal' if causal else 'both'}-{layout}")
    for kind, layout in itertools.product(KINDS, LAYOUTS)
    for causal in (True, False)
    if kind.has(causal)
]


@pytest.mark.parametrize("length", ["whole", "no last token", "first rows", "text and one"])
@pytest.mark.parametrize(("kind", "layout", "causal"), CASES)
def test_every_backend_is_the_dense_oracle(kind: Kind, layout: str, causal: bool, length: str):
    shape = LAYOUTS[layout]
    pattern = make(kind, shape, causal)
    lengths = {"whole": shape.seq, "no last token": shape.seq - 1, "text and one": shape.text + 1}
    lengths["first rows"] = shape.text + 2 * shape.grid_w + 3
    count = lengths[length]
    expected = values_and_gradients(lambda *qkv: dense_attention(*qkv, pattern), count, torch.float64)
    for backend in ("sdpa", "fast"):
        try:
            choose_backend(pattern, CPU, torch.float64, grad=True, length=count, backend_override=backend)
        except ConfigError:
            assert backend == "fast" and (not causal or not has_fast_path(pattern))
            continue
        if backend not in attention.KINDS[kind.kind].backends:
            continue
        found = values_and_gradients(
            lambda *qkv, backend=backend: attend(*qkv, pattern, backend=backend), count, torch.float64
        )
        assert worst(found, expected) < 1e-13, backend


@pytest.mark.parametrize(("kind", "layout", "causal"), CASES)
def test_padding_masks_reach_every_kind(kind: Kind, layout: str, causal: bool):
    pattern, length = make(kind, LAYOUTS[layout], causal), LAYOUTS[layout].seq
    key_mask = torch.rand(BATCH, length, generator=torch.Generator().manual_seed(1)) > 0.3
    key_mask[0, :2] = False  # in a causal row this leaves some queries without any key
    key_mask[:, 5] = True
    backend = choose_backend(pattern, CPU, torch.float64, grad=True, length=length, masked=True)
    found, expected = (
        values_and_gradients(
            lambda *qkv, name=name: attend(*qkv, pattern, key_mask, backend=name), length, torch.float64
        )
        for name in (backend, "dense")
    )
    assert worst(found, expected) < 1e-13
    hidden = (~key_mask)[:, None, :, None].expand_as(found[2])
    assert found[2][hidden].eq(0).all() and found[3][hidden].eq(0).all()


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_dtype_keeps_its_precision(kind: Kind, dtype: torch.dtype, bound: float):
    layout = LAYOUTS["text+image"]
    pattern = make(kind, layout, True)
    expected = values_and_gradients(lambda *qkv: dense_attention(*qkv, pattern), layout.seq, torch.float64)
    for backend in ("dense", "sdpa", "fast"):
        if backend == "fast" and not has_fast_path(pattern):
            continue
        found = values_and_gradients(
            lambda *qkv, backend=backend: attend(*qkv, pattern, backend=backend), layout.seq, dtype
        )
        assert found[0].dtype == dtype
        assert worst(found, expected) < bound, backend


def test_text_queries_do_not_see_padded_text_either():
    pattern = AttentionPattern("axial_row", LAYOUTS["text+image"], heads=HEADS)
    key_mask = torch.ones(BATCH, 20, dtype=torch.bool)
    key_mask[:, 3] = False
    q, k, v = torch.randn(3, BATCH, HEADS, 20, DIM).unbind()
    base = attend(q, k, v, pattern, key_mask, backend="sdpa")
    changed = v.clone()
    changed[:, :, 3] += 100
    assert torch.equal(attend(q, k, changed, pattern, key_mask, backend="sdpa"), base)


def test_queries_are_not_scaled_in_place():
    pattern = AttentionPattern("axial_row", LAYOUTS["text+image"], heads=1)
    q, k, v = torch.randn(3, 1, 1, 20, DIM).unbind()
    before = q.clone()
    for backend in ("dense", "sdpa", "fast"):
        attend(q.requires_grad_(), k, v, pattern, backend=backend).sum().backward()
        assert torch.equal(q, before)


def test_the_stable_softmax_is_the_softmax_on_large_logits_too():
    pattern = AttentionPattern("full", LAYOUTS["text+image"], heads=HEADS)
    q, k, v = (64 * torch.randn(BATCH, HEADS, 30, DIM) for _ in range(3))
    plain, stable = (dense_attention(q, k, v, pattern, stable=stable) for stable in (False, True))
    assert (plain - stable).abs().max() < 1e-3 * plain.abs().max()
    assert torch.isfinite(stable).all()


def test_a_grid_that_no_tile_divides_is_left_to_the_dense_mask():
    pattern = AttentionPattern("conv_like", TokenLayout(3, 23, 23), kernel_size=3)
    assert not has_fast_path(pattern)
    assert choose_backend(pattern, CPU, torch.float32, grad=True, length=532) == "sdpa"
    with pytest.raises(ConfigError, match="'fast' cannot compute 'conv_like' here: no tile fits"):
        choose_backend(pattern, CPU, torch.float32, grad=True, length=532, backend_override="fast")


@pytest.mark.parametrize("kind", [name for name, kind in attention.KINDS.items() if "fast" in kind.backends])
def test_the_fast_paths_are_chosen_where_they_pay(kind: str):
    large = AttentionPattern(kind, TokenLayout(257, 32, 32))
    assert choose_backend(large, CPU, torch.float32, grad=True, length=1280) == "fast"
    small = AttentionPattern(kind, TokenLayout(9, 4, 4))
    assert choose_backend(small, CPU, torch.float32, grad=True, length=24) == "sdpa"


def test_flex_is_for_gpus_and_never_trains_on_the_cpu():
    pattern = AttentionPattern("axial_row", TokenLayout(257, 32, 32))
    with pytest.raises(ConfigError, match="no backward pass on the CPU; use auto"):
        choose_backend(pattern, CPU, torch.float32, grad=True, length=1280, backend_override="flex")
    gpu = torch.device("cuda")
    assert choose_backend(pattern, gpu, torch.bfloat16, grad=True, length=1280) in ("flex", "sdpa")


def test_natten_says_what_it_misses():
    pattern = AttentionPattern("conv_like", TokenLayout(257, 32, 32))
    with pytest.raises(ConfigError, match="'natten' cannot compute 'conv_like' here: it needs a GPU"):
        choose_backend(pattern, CPU, torch.float32, grad=True, length=1280, backend_override="natten")
    other = AttentionPattern("full", TokenLayout(257, 32, 32))
    assert choose_backend(other, CPU, torch.float32, grad=True, length=1280, backend_override="natten") == "sdpa"


def test_natten_is_the_same_window():
    pytest.importorskip("natten")
    from tokscale.nn.attention.natten_backend import natten_attention, natten_refusal

    for kernel, dilation in ((3, 2), (5, 1)):
        pattern = AttentionPattern("conv_like", TokenLayout(7, 8, 8), heads=2, kernel_size=kernel, dilation=dilation)
        assert natten_refusal(pattern) is None
        q, k, v = torch.randn(3, 2, 2, 70, 32).unbind()
        found, expected = (run(q, k, v, pattern) for run in (natten_attention, dense_attention))
        assert (found - expected).abs().max() < 5e-6


def test_sdpa_sees_no_key_as_zeros():
    """What a row without keys gives, which both `dense` and the padding masks above rely on."""
    q, k, v = torch.randn(3, 1, 1, 4, DIM).unbind()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(4, 4, dtype=torch.bool))
    assert out.eq(0).all()
