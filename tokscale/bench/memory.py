"""What training needs of a GPU's memory, counted where there is none: on the meta device, where nothing is computed.

State is counted from the parameters' shapes. What comes on top of it in a step is the peak of the bytes that tensors
hold at once while the model's forward and backward pass run on the meta device, gradients going as they come, as ZeRO-3
has it. Not counted: the working memory of kernels, the allocator's loss, and the few hundred megabytes of the CUDA
context.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokscale.base.batch import TokenBatch
from tokscale.bench.live import LiveBytes
from tokscale.engine.config import ZeroConfig
from tokscale.engine.ds_config import deepspeed_config
from tokscale.engine.groups import base_of, parameter_groups
from tokscale.engine.optimizer import AnyOptimizerConfig, optimizer_of

BYTES = {"fp32": 4, "bf16": 2}
MAX_LIVE_PARAMETERS = 1_000_000_000
"""Elements of gathered parameters that DeepSpeed keeps for their next use, by its own default."""


class Need(NamedTuple):
    """Bytes beside the state, at their most."""

    forward: float
    backward: float


def state_bytes(model: nn.Module, optim: AnyOptimizerConfig, dtype: str, ranks: int, ema: int = 0) -> dict[str, float]:
    """Bytes that stay on each of `ranks` GPUs under ZeRO-3, by what they are for.

    Args:
        model: On the meta device. What is frozen has no gradients, masters and moments.
        optim: What moves the weights.
        dtype: `fp32` or `bf16`: of the parameters that forward reads.
        ranks: Over which everything is divided.
        ema: Averages of the weights.
    """
    sizes = [parameter.numel() for parameter in model.parameters()]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / ranks
    width, share = BYTES[dtype], sum(sizes) / ranks
    moments, replicated = _moments(model, optim)
    return {
        "parameters": width * (share + (_kept_whole(sizes) if ranks > 1 else 0)),
        "gradients": 4 * trained,
        "master": 4 * trained,
        "moments": moments / ranks + replicated,
        "averages": 4 * share * ema,
        "buckets": float(width * _buckets(sizes)[0]),
    }


def gathered_bytes(model: nn.Module, dtype: str, ranks: int, need: Need) -> float:
    """What parameters that are whole for a while add to the most that a pass needs.

    Args:
        model: On the meta device.
        dtype: `fp32` or `bf16`.
        ranks: One alone gathers nothing.
        need: Of the passes.
    """
    if ranks == 1:
        return 0.0
    sizes = [parameter.numel() for parameter in model.parameters()]
    divided = sum(sizes) - _kept_whole(sizes)
    live, fetched = min(divided, MAX_LIVE_PARAMETERS), min(divided, _buckets(sizes)[1])
    # Those fetched ahead come in one piece each time, from which they are copied. Where all stay for their next use,
    # nothing is fetched in the backward pass.
    backward = need.backward + BYTES[dtype] * (live + (fetched if live < divided else 0))
    forward = need.forward + BYTES[dtype] * (live + fetched)
    return max(forward, backward) - max(need)


def _kept_whole(sizes: list[int]) -> int:
    return sum(size for size in sizes if size < ZeroConfig().param_persistence_threshold)


def _buckets(sizes: list[int]) -> tuple[int, int]:
    """Elements reduced at once, and fetched ahead."""
    options = deepspeed_config(ZeroConfig(), parameters=sum(sizes), micro_batches=1, micro_batch_size=1)
    found = options["zero_optimization"]
    return found["reduce_bucket_size"], found["stage3_prefetch_bucket_size"]


def _moments(model: nn.Module, optim: AnyOptimizerConfig) -> tuple[int, int]:
    """Bytes of optimizer state that are divided over ranks, and those that every rank holds."""
    divided = replicated = 0
    kind = optimizer_of(optim)
    for group in parameter_groups(model, optim.lr_scales):
        for parameter in group.parameters.values():
            shape = tuple(parameter.shape)
            for slot in kind.slots(optim, shape, base_of(group.name)):
                size = slot.numel(shape) * slot.dtype.itemsize
                divided, replicated = (
                    divided + size * (slot.shape is None),
                    replicated + size * (slot.shape is not None),
                )
    return divided, replicated


def step_peak(model: nn.Module, batch: TokenBatch) -> Need:
    """What a step's two passes need beside parameters, gathered ones and the batch. All on the meta device."""
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        parameter.register_post_accumulate_grad_hook(_gone)
    given = [*model.parameters(), *model.buffers()]
    given += [batch.positions, batch.text, batch.text_mask, batch.codes, *batch.extra.values()]
    with _counted_as_fused(), _AsManyAsCouldBe(), LiveBytes(given) as live:
        loss = model(batch).total
        forward = live.peak
        live.restart()
        loss.backward()
    return Need(float(forward), float(live.peak))


def _gone(parameter: Tensor) -> None:
    parameter.grad = None


class _AsManyAsCouldBe(TorchDispatchMode):
    """Where a model asks how many of something there are, which on the meta device nobody knows: all of them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return 1 << 20
        if func is aten.nonzero.default and args[0].is_meta:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and args[0].is_meta:
            args = (args[0], _as_numbers(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


def _as_numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices with masks in the form that numbers have, one for each axis."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            found += [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.dim())]
        else:
            found.append(index)
    return found


class _Fused(torch.autograd.Function):
    """Keeps what fused attention keeps: its inputs, its output and one number per query, but no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextmanager
def _counted_as_fused() -> Iterator[None]:
    """On the meta device torch takes attention apart, and would keep scores that no fused kernel keeps."""

    def fused(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Fused.apply(q, k, v)  # type: ignore[return-value]  # torch does not type `apply`

    with mock.patch.object(F, "scaled_dot_product_attention", fused):
        yield
