"""The device itself, and attention by every backend on it."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from tokscale.base import rng
from tokscale.base.errors import ConfigError
from tokscale.bench.acceptance.setting import Setting
from tokscale.bench.measure import figure, interleaved, row, skipped
from tokscale.nn.attention.backend import attend, choose_backend
from tokscale.nn.attention.pattern import KINDS, AttentionPattern, Backend
from tokscale.nn.attention.reference import dense_attention
from tokscale.nn.attention.sparsity import FixedLayout
from tokscale.nn.layout import TokenLayout
from tokscale.train.hardware import arithmetic_here, peak_flops_here

HEADS, WIDTH = 2, 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}
"""Of the largest value; in fp32 products are exact here."""


def machine(setting: Setting) -> Iterator[dict[str, Any]]:
    """Speed of a large product in each arithmetic beside the vendor's figure, and of copies."""
    device, size = setting.device, 256 if setting.tiny else 8192
    cuda = device.type == "cuda"
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        yield figure("gpu/machine/memory", properties.total_memory / 1e9, "GB")
        yield figure("gpu/machine/capability", properties.major + properties.minor / 10, "sm")
    for dtype, precision in (("bf16", "highest"), ("fp32", "high"), ("fp32", "highest")):
        a, b = (torch.ones(size, size, dtype=DTYPES[dtype], device=device) for _ in range(2))
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            speed = 2 * size**3 / interleaved({"matmul": lambda a=a, b=b: a @ b}, 5, device)["matmul"]
            name, peak = arithmetic_here(device, dtype), peak_flops_here(device, dtype)
        finally:
            torch.set_float32_matmul_precision(before)
        case = f"gpu/machine/matmul-{size}/{name}"
        if peak is None:
            yield figure(f"{case}/throughput", speed / 1e12, "TFLOP/s")
        else:
            yield row(f"{case}/vs-peak/throughput", speed / 1e12, peak / 1e12, "TFLOP/s", more_is_better=True)
    count = 1 << (20 if setting.tiny else 28)
    here = torch.ones(count, dtype=torch.uint8, pin_memory=cuda)
    there = torch.empty(count, dtype=torch.uint8, device=device)
    seconds = interleaved({"to": lambda: there.copy_(here, non_blocking=True), "in": there.clone}, 3, device)
    yield figure("gpu/machine/host-to-device/throughput", count / seconds["to"] / 1e9, "GB/s")
    yield figure("gpu/machine/device-to-device/throughput", 2 * count / seconds["in"] / 1e9, "GB/s")


def numerics(setting: Setting) -> Iterator[dict[str, Any]]:
    """Attention and its gradient by every backend beside dense attention in fp32 of the same numbers.

    `ours` is the largest error as a share of the largest value, `baseline` what is allowed.
    """
    grids, text = ((4, 6), 5) if setting.tiny else ((16, 32), 128)
    backends: tuple[Backend, ...] = ("sdpa", "flex", "natten") if setting.device.type == "cuda" else ("sdpa", "fast")
    for dtype, grid, kind, backend in product(setting.dtypes, grids, KINDS, backends):
        pattern = _pattern(kind, text, grid)
        if pattern is None or (backend != "sdpa" and backend not in pattern.parts.backends):
            continue
        for batch, grad in ((1, False), (3, False), (2, True)):
            name = f"gpu/numerics/{kind}/{batch}x{text}+{grid}x{grid}/{dtype}/{backend}"
            name += "/gradient" if grad else "/forward"
            length = pattern.layout.seq - 1
            try:
                chosen = choose_backend(
                    pattern, setting.device, DTYPES[dtype], grad=grad, length=length, backend_override=backend
                )
            except ConfigError as error:
                yield skipped(name, f"{error}")
                continue
            if chosen == backend:
                yield _error(name, pattern, backend, setting.device, dtype, batch, grad)


def _pattern(kind: str, text: int, grid: int) -> AttentionPattern | None:
    """Causal, with a window that every backend knows; None where a kind cannot be had."""
    try:
        return AttentionPattern(
            kind,
            TokenLayout(text + 1, grid, grid),
            heads=HEADS,
            kernel_size=3,
            conv_window="centered",
            sparse=FixedLayout(block=8, num_local_blocks=2, num_global_blocks=1),
        )
    except ConfigError:
        return None


def _error(
    name: str, pattern: AttentionPattern, backend: Backend, device: torch.device, dtype: str, batch: int, grad: bool
) -> dict[str, Any]:
    draw = rng.generator(0, "bench", "numerics")
    shape = (batch, HEADS, pattern.layout.seq - 1, WIDTH)
    q, k, v, weight = (torch.randn(shape, generator=draw).to(device, DTYPES[dtype]) for _ in range(4))
    given = (q.requires_grad_(grad), k.requires_grad_(grad), v.requires_grad_(grad))
    exact_q, exact_k, exact_v = (tensor.detach().float().requires_grad_(grad) for tensor in given)
    found = attend(*given, pattern, backend=backend)
    wanted = dense_attention(exact_q, exact_k, exact_v, pattern)
    pairs = [(found, wanted)]
    if grad:
        grads = torch.autograd.grad(found, given, weight)
        exact = torch.autograd.grad(wanted, (exact_q, exact_k, exact_v), weight.float())
        pairs += zip(grads, exact, strict=True)
    error = max(((ours.float() - right).abs().max() / right.abs().max()).item() for ours, right in pairs)
    return row(name, max(error, 1e-12), TOLERANCE[dtype], "of the largest value", 1.0)
