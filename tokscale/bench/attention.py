"""`bench attention`: every attention kind beside the original's and dense causal attention, and what decoding costs.

Attention is measured from queries, keys and values to its output and their gradients, at the length of training. The
original's side is the original class with its projections taken out, since those are the same matrix products on both.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from tokscale.base import rng
from tokscale.base.config import Config, decode, encode
from tokscale.bench.comparison import Comparison, original, originals_python, ours
from tokscale.bench.measure import interleaved, one_thread, peak_bytes, row, skipped
from tokscale.nn.attention.backend import attend, choose_backend
from tokscale.nn.attention.pattern import KINDS, AttentionKindName, AttentionPattern, Backend
from tokscale.nn.attention.sparsity import FixedLayout, SparseLayout
from tokscale.nn.config import StackConfig
from tokscale.nn.layout import TokenLayout
from tokscale.nn.stack import Stack

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
VS_SDPA = {("axial_row", 64): 5.0, ("axial_col", 64): 5.0, ("conv_like", 64): 3.5}
"""Targets on a CPU in float32: how many times faster than dense causal attention, by kind and side of the grid."""
VS_ORIGINAL = {
    ("full", 32): (4.0, 5.0),
    ("full", 64): (4.0, 5.0),
    ("axial_row", 32): (1.8, 1 / 0.9),
    ("axial_col", 32): (1.8, 1 / 0.9),
    ("axial_row", 64): (2.0, 1.5),
    ("axial_col", 64): (2.0, 1.5),
    ("conv_like", 32): (5.0, 3.0),
    ("conv_like", 64): (5.0, 3.0),
}
"""Likewise against the original's classes: time and memory."""
VS_ORIGINAL_COMPILED = 8.0
"""Of `conv_like`, compiled."""
VS_RECOMPUTED, VS_HISTORY, VS_CACHED = 50.0, 10.0, 1.15
"""Targets of sampling beside the original: without its cache; with it, where layers recompute their history; `full`."""
STEP_SPREAD = 1 / 1.15
"""Target: a decoding step of any kind at any position costs at most 15 % more than the cheapest."""


class AttentionBench(Config):
    """What `bench attention` measures."""

    text: int = Field(default=256, ge=1)
    """Caption tokens; a start token comes on top."""
    grids: tuple[PositiveInt, ...] = (32, 64)
    """Sides of the square token grids."""
    batches: tuple[PositiveInt, ...] = (4, 1)
    """Samples at once, for each grid."""
    kinds: tuple[AttentionKindName, ...] = tuple(KINDS)
    """Attention kinds."""
    sparse: SparseLayout = FixedLayout(block=64, num_local_blocks=4, num_global_blocks=1)
    """Block layout of the sparse kind."""
    heads: int = Field(default=8, ge=1)
    """Attention heads."""
    dim_head: int = Field(default=64, ge=8)
    """Width of a head."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of queries, keys and values."""
    device: Literal["cpu", "cuda"] = "cpu"
    """On the CPU, one thread's CPU time; on a GPU, wall time between synchronisations, and the share of a large matrix
    product's speed that attention reaches."""
    rounds: int = Field(default=3, ge=1)
    """Interleaved rounds; the best of each side counts."""
    compiled: bool = True
    """Measure `conv_like` compiled as well, where a compiler is found."""
    originals: bool = True
    """Measure beside the original's classes, too, in the environment that `./launch/originals` builds."""
    decode_depth: int = Field(default=12, ge=0)
    """Layers of the stack whose decoding steps are measured; 0 leaves decoding out."""
    decode_positions: tuple[PositiveInt, ...] = (300, 769, 1240)
    """Positions at which a decoding step is measured, on the first grid."""
    decode_batches: tuple[PositiveInt, ...] = (1, 2)
    """Samples at once, in decoding; guidance doubles them."""

    @model_validator(mode="after")
    def _one_batch_per_grid(self) -> "AttentionBench":
        if len(self.batches) != len(self.grids):
            raise ValueError(f"batches: got {len(self.batches)} sizes for {len(self.grids)} grids; give one for each")
        return self


CONFIG = AttentionBench


def rows(config: AttentionBench) -> Iterator[dict[str, Any]]:
    """Measure, and yield the rows of the report.

    Raises:
        EnvironmentRefused: When the originals are wanted and were not built.
    """
    if config.originals and config.device == "cpu" and config.dtype == "float32":
        originals_python()
        with Comparison() as comparison:
            for grid, batch in zip(config.grids, config.batches, strict=True):
                yield from _against_original(config, comparison, grid, batch)
            for batch in config.decode_batches if config.decode_depth else ():
                yield from _sampling_against_original(config, comparison, batch)
    for grid, batch in zip(config.grids, config.batches, strict=True):
        for kind in config.kinds:
            yield from _against_sdpa(config, kind, grid, batch)
    for batch in config.decode_batches if config.decode_depth else ():
        yield from _decoding(config, batch)


def _against_original(
    config: AttentionBench, comparison: Comparison, grid: int, batch: int
) -> Iterator[dict[str, Any]]:
    """Rows beside the original classes; `sparse`, which cannot run there any more, beside a dense mask of ours."""
    sizes = {"batch": batch, "text": config.text, "grid": grid, "heads": config.heads, "dim_head": config.dim_head}
    for kind in config.kinds:
        case, given = f"attention/{kind}/{batch}x{config.text}+{grid}x{grid}/fp32", {"kind": kind, **sizes}
        mine = ours(f"{__name__}:formulation", **given)
        if kind == "sparse":
            blocks = {"sparse": encode(config.sparse)}
            yield from comparison.rows(
                case,
                ours(f"{__name__}:formulation", **given, **blocks),
                rounds=config.rounds,
                masked=ours(f"{__name__}:formulation", **given, **blocks, backend="sdpa"),
            )
            continue
        time, memory = VS_ORIGINAL.get((kind, grid), (None, None))
        theirs = original("attention.py:formulation", **given)
        yield from comparison.rows(case, mine, rounds=config.rounds, time=time, memory=memory, original=theirs)
        if kind == "conv_like" and config.compiled:
            if shutil.which("g++") is None:
                yield skipped(f"{case}/compiled/vs-original/time", "no g++, which torch.compile calls on a CPU")
                continue
            mine = ours(f"{__name__}:formulation", **given, compiled=True)
            found = comparison.measure({"compiled": mine, "original": theirs}, rounds=config.rounds, memory=False)
            taken, baseline = found["compiled"].seconds * 1e3, found["original"].seconds * 1e3
            yield row(f"{case}/compiled/vs-original/time", taken, baseline, "ms", VS_ORIGINAL_COMPILED)


def _sampling_against_original(config: AttentionBench, comparison: Comparison, batch: int) -> Iterator[dict[str, Any]]:
    """A whole image, extrapolated from steps measured at `decode_positions`, beside the original's two ways."""
    grid, depth = config.grids[0], config.decode_depth
    first, last = config.text + 1, config.text + grid * grid
    places = [place for place in config.decode_positions if first <= place < last]
    for kind in (kind for kind in config.kinds if kind != "sparse"):
        totals: dict[str, float] = dict.fromkeys(("ours", "recomputed", "cached"), 0.0)
        for place in places:
            given: dict[str, Any] = {"kind": kind, "batch": batch, "text": config.text, "grid": grid, "depth": depth}
            given |= {"heads": config.heads, "dim_head": config.dim_head, "place": place}
            fast = {
                "ours": ours(f"{__name__}:decoding", **given),
                "cached": original("attention.py:decoding", **given, cached=True),
            }
            found = comparison.measure(fast, rounds=config.rounds, memory=False)
            slow = {"recomputed": original("attention.py:decoding", **given, cached=False)}
            found |= comparison.measure(slow, rounds=1, memory=False, warm=False)
            for side, measured in found.items():
                totals[side] += measured.seconds * grid * grid / len(places)
        case = f"attention/sample-{kind}-{depth}-layers/{batch}x{config.text}+{grid}x{grid}/fp32"
        yield row(f"{case}/vs-original-recomputed/time", totals["ours"], totals["recomputed"], "s", VS_RECOMPUTED)
        goal = VS_CACHED if kind == "full" else VS_HISTORY
        yield row(f"{case}/vs-original-cached/time", totals["ours"], totals["cached"], "s", goal)


def _pattern(config: AttentionBench, kind: AttentionKindName, grid: int) -> AttentionPattern:
    layout = TokenLayout(config.text + 1, grid, grid)
    return AttentionPattern(kind, layout, heads=config.heads, sparse=config.sparse)


def _against_sdpa(config: AttentionBench, kind: AttentionKindName, grid: int, batch: int) -> Iterator[dict[str, Any]]:
    """Forward and backward time and memory beside PyTorch's dense causal attention on the same tensors."""
    pattern, dtype, device = _pattern(config, kind, grid), getattr(torch, config.dtype), torch.device(config.device)
    length = pattern.layout.seq - 1
    backend = choose_backend(pattern, device, dtype, grad=True, length=length)
    shape = (batch, config.heads, length, config.dim_head)
    stream = rng.generator(0, "bench", "attention")
    q, k, v, weight = (torch.randn(shape, generator=stream).to(device, dtype) for _ in range(4))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]

    def step(run: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(*leaves), leaves, weight)

    sides = {
        "ours": step(lambda q, k, v: attend(q, k, v, pattern, backend=backend)),
        "sdpa": step(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    }
    case = f"attention/{kind}/{batch}x{config.text}+{grid}x{grid}/{SHORT[config.dtype]}/{backend}"
    seconds = interleaved(sides, config.rounds, device)
    target = VS_SDPA.get((kind, grid)) if (config.device, config.dtype) == ("cpu", "float32") else None
    yield row(f"{case}/vs-sdpa/time", seconds["ours"] * 1e3, seconds["sdpa"] * 1e3, "ms", target)
    with one_thread():
        peaks = {name: peak_bytes(call, device) for name, call in sides.items()}
    if peaks["ours"] and peaks["sdpa"]:
        yield row(f"{case}/vs-sdpa/memory", peaks["ours"] / 1e6, peaks["sdpa"] / 1e6, "MB")
    if device.type == "cuda":
        # Two products forward, five backward: the scores are computed twice.
        flops = 14 * config.dim_head * config.heads * batch * pattern.pairs(length)
        speed, peak = flops / seconds["ours"] / 1e12, _matmul_teraflops(dtype, device)
        yield row(f"{case}/vs-matmul/throughput", speed, peak, "TFLOP/s", more_is_better=True)


def formulation(
    kind: AttentionKindName,
    batch: int,
    text: int,
    grid: int,
    heads: int,
    dim_head: int,
    sparse: dict[str, Any] | None = None,
    backend: Backend | None = None,
    compiled: bool = False,
) -> Callable[[], object]:
    """Our side of `tests/originals/attention.py`: from queries, keys and values side by side to their gradient."""
    layout = TokenLayout(text + 1, grid, grid)
    blocks: SparseLayout = decode(SparseLayout, sparse) if sparse else AttentionBench().sparse
    pattern = AttentionPattern(kind, layout, heads=heads, sparse=blocks)
    stream, length = rng.generator(0, "bench", "attention"), text + grid * grid
    tokens = torch.randn(batch, length, 3 * heads * dim_head, generator=stream).requires_grad_()
    weight = torch.randn(batch, length, heads * dim_head, generator=stream)
    backend = choose_backend(pattern, tokens.device, tokens.dtype, grad=True, length=length, backend_override=backend)

    def mixed(tokens: Tensor) -> Tensor:
        q, k, v = rearrange(tokens, "b n (three h d) -> three b h n d", three=3, h=heads)
        return rearrange(attend(q, k, v, pattern, backend=backend), "b h n d -> b n (h d)")

    run: Callable[[Tensor], Tensor] = torch.compile(mixed) if compiled else mixed
    return lambda: torch.autograd.grad(run(tokens), tokens, weight)


def decoding(
    kind: AttentionKindName, batch: int, text: int, grid: int, heads: int, dim_head: int, depth: int, place: int
) -> Callable[[], object]:
    """Our side of the function of that name there: one step on a cache that holds `place` positions."""
    config = AttentionBench(kinds=(kind,), heads=heads, dim_head=dim_head, decode_depth=depth)
    stack = _stacks(config, TokenLayout(text + 1, grid, grid))[kind]
    return _step(stack, torch.ones(batch, 1, heads * dim_head), place)


def _matmul_teraflops(dtype: torch.dtype, device: torch.device) -> float:
    """The speed of a large matrix product: what the machine can do at best."""
    size = 8192
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / interleaved({"matmul": lambda: a @ b}, 10, device)["matmul"] / 1e12


def _decoding(config: AttentionBench, batch: int) -> Iterator[dict[str, Any]]:
    """Time of one decoding step by kind and position; and of a whole image beside computing every prefix anew.

    An image's time is extrapolated from the measured steps, and from full passes of the measured lengths.
    """
    grid, depth = config.grids[0], config.decode_depth
    layout = TokenLayout(config.text + 1, grid, grid)
    places = [place for place in config.decode_positions if layout.text <= place < layout.seq]
    stacks = _stacks(config, layout)
    dim = config.heads * config.dim_head
    steps = {
        (kind, place): _step(stack, torch.ones(batch, 1, dim), place)
        for (kind, stack), place in product(stacks.items(), places)
    }
    passes = {
        (kind, place): _pass(stack, torch.ones(batch, place, dim))
        for (kind, stack), place in product(stacks.items(), places)
    }
    seconds = _named(steps, config.rounds * 3)
    cheapest = min(seconds.values())
    size = f"{batch}x{config.text}+{grid}x{grid}/fp32"
    for (kind, place), taken in seconds.items():
        name = f"attention/decode-{kind}-at-{place}/{size}/vs-cheapest/time"
        yield row(name, taken * 1e3, cheapest * 1e3, "ms", STEP_SPREAD)
    whole = _named(passes, 1)
    for kind in stacks:
        ours, anew = (
            layout.image * sum(times[kind, place] for place in places) / len(places) for times in (seconds, whole)
        )
        yield row(f"attention/sample-{kind}-{depth}-layers/{size}/vs-recomputed/time", ours, anew, "s")


def _stacks(config: AttentionBench, layout: TokenLayout) -> dict[str, Stack]:
    """One stack per kind, all with the same weights."""
    stacks: dict[str, Stack] = {}
    weights: Mapping[str, Any] | None = None
    for kind in config.kinds:
        options = StackConfig(
            dim=config.heads * config.dim_head,
            depth=config.decode_depth,
            heads=config.heads,
            dim_head=config.dim_head,
            attn_types=(kind,),
            sparse=config.sparse,
        )
        with rng.scope(0, "bench", "decoding"), torch.device("meta" if weights else "cpu"):
            stack = Stack(options, layout).eval()
        weights = weights or stack.state_dict()
        stack.load_state_dict(weights, assign=True)
        stacks[kind] = stack
    return stacks


def _step(stack: Stack, token: Tensor, place: int) -> Callable[[], object]:
    """One step at `place`, again and again. What the cache holds does not matter for time."""
    cache = stack.new_cache(len(token), device="cpu", dtype=token.dtype)

    def step() -> None:
        cache.offset = place
        with torch.inference_mode():
            stack(token, cache=cache)

    return step


def _pass(stack: Stack, tokens: Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: stack(tokens))


def _named(calls: Mapping[tuple[str, int], Callable[[], object]], rounds: int) -> dict[tuple[str, int], float]:
    seconds = interleaved({f"{kind}/{place}": call for (kind, place), call in calls.items()}, rounds)
    return {key: seconds[f"{key[0]}/{key[1]}"] for key in calls}
