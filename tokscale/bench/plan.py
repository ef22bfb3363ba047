"""`bench plan`: what training a model under ZeRO-3 takes of each GPU's memory, before any GPU is asked for.

    tokscale bench plan model=parti/paper_20b optim=adafactor nodes=[2,4,8]

State is counted from the parameters' shapes. Activations are counted by running the model's forward pass on the meta
device, where nothing is computed, and adding up what autograd would keep, once for each choice of `remat`. A row's
ratio is how many times the need fits into the GPU. Not counted: the working memory of kernels, the allocator's loss,
and the few hundred megabytes of the CUDA context.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, assert_never, get_args
from unittest import mock

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tokscale.base.batch import LABELS, TEXT_EMBEDS, TEXT_EMBEDS_MASK, TokenBatch
from tokscale.base.config import Config, kind_of
from tokscale.base.errors import ConfigError
from tokscale.bench.measure import row
from tokscale.engine.config import AdamWConfig, OptimizerConfig, ZeroConfig
from tokscale.engine.ds_config import deepspeed_config
from tokscale.engine.groups import parameter_groups
from tokscale.engine.optimizer import AnyOptimizerConfig, optimizer_of
from tokscale.models.common import condition_of
from tokscale.models.registry import ModelConfig, build_model
from tokscale.nn.conditioning import CaptionConfig, ClassesConfig, EmbeddingsConfig

BYTES = {"fp32": 4, "bf16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PlanBench(Config):
    """What `bench plan` is asked."""

    model: ModelConfig
    """What is to be trained, as `model=parti/paper_20b`."""
    optim: OptimizerConfig = AdamWConfig()
    """What moves the weights; decides how large the moments are."""
    dtype: str = Field(default="bf16", pattern="^(fp32|bf16)$")
    """Of parameters and activations."""
    nodes: tuple[PositiveInt, ...] = (1, 2, 4, 8)
    """Numbers of machines."""
    gpus: int = Field(default=8, ge=1)
    """GPUs of a machine."""
    gpu_bytes: float = Field(default=141e9, gt=0)
    """Memory of one; an H200 has 141 GB."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Samples of one forward pass on one GPU."""
    codes: int = Field(default=8192, ge=2)
    """Entries of the codebook."""
    code_shape: tuple[PositiveInt, ...] = (32, 32)
    """Rows and columns of codes, and levels where there are some."""
    words: int = Field(default=16384, ge=2)
    """Entries of the text tokenizer."""


CONFIG = PlanBench


def rows(config: PlanBench) -> Iterator[dict[str, Any]]:
    """Count. `ours` is GB on one GPU, `baseline` what the GPU has."""
    fitted = fit(config)
    with torch.device("meta"):
        model = build_model(fitted)
    kept = {choice: activation_bytes(fitted, config, choice) for choice in remat_choices(fitted)}
    for nodes in config.nodes:
        state = state_bytes(model, config, nodes * config.gpus)
        for part, need in state.items():
            yield _row(config, nodes, part, need, None)
        for choice, need in kept.items():
            yield _row(config, nodes, f"activations-remat-{choice}", need, None)
            yield _row(config, nodes, f"total-remat-{choice}", need + sum(state.values()), None)


def fit(config: PlanBench) -> Any:
    """The model's configuration with its sizes taken from those of the plan.

    Raises:
        ConfigError: For a model of images.
    """
    if not hasattr(config.model, "image_grid") and not hasattr(config.model, "num_image_tokens"):
        raise ConfigError(f"model.kind={kind_of(config.model)}: only models of image codes can be planned")
    image = SimpleNamespace(num_tokens=config.codes, code_shape=config.code_shape, image_size=0, channels=3)
    model: Any = config.model
    return model.fitted(image, SimpleNamespace(num_tokens=config.words))


def state_bytes(model: nn.Module, config: PlanBench, ranks: int) -> dict[str, float]:
    """Bytes on each of `ranks` GPUs: parameters, gradients, master weights, moments, and buffers of communication.

    Args:
        model: On the meta device.
        config: The plan.
        ranks: Over which everything is divided.
    """
    sizes = [parameter.numel() for parameter in model.parameters()]
    zero = ZeroConfig(dtype="bf16" if config.dtype == "bf16" else "fp32")
    options = deepspeed_config(zero, parameters=sum(sizes), micro_batches=1, micro_batch_size=config.micro_batch_size)
    reduce, fetch = (
        min(options["zero_optimization"][key], sum(sizes))
        for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size")
    )
    whole = sum(size for size in sizes if size < zero.param_persistence_threshold)
    width, share = BYTES[config.dtype], sum(sizes) / ranks
    moments, replicated = _moments(model, config.optim)
    return {
        "parameters": width * (share + whole),
        "gradients": 4 * share,
        "master": 4 * share,
        "moments": moments / ranks + replicated,
        "buckets": float(width * (reduce + fetch)),
    }


def _moments(model: nn.Module, optim: AnyOptimizerConfig) -> tuple[int, int]:
    """Bytes of optimizer state that are divided over ranks, and those that every rank holds."""
    divided = replicated = 0
    kind = optimizer_of(optim)
    for group in parameter_groups(model):
        for parameter in group.parameters.values():
            shape = tuple(parameter.shape)
            for slot in kind.slots(optim, shape, group.name):
                size = slot.numel(shape) * slot.dtype.itemsize
                divided, replicated = (
                    divided + size * (slot.shape is None),
                    replicated + size * (slot.shape is not None),
                )
    return divided, replicated


def remat_choices(model: Any) -> list[str]:
    """The values of `remat` that a model's configuration knows."""
    return list(get_args(type(model).model_fields["remat"].annotation))


def activation_bytes(model: Any, config: PlanBench, choice: str) -> float:
    """Bytes that autograd keeps of one forward pass, and under `remat` what one layer needs while it is recomputed.

    Args:
        model: Fitted configuration.
        config: The plan.
        choice: Value of `remat`.
    """
    kept = _saved(with_remat(model, choice), config)
    if choice == "none":
        return kept
    # The difference that a layer makes to what is kept without recomputation is what one has at once with it.
    shallow = model.model_copy(update={"depth": 1})
    each = (_saved(with_remat(model, "none"), config) - _saved(with_remat(shallow, "none"), config)) / max(
        model.depth - 1, 1
    )
    return kept + each


def with_remat(model: Any, choice: str) -> Any:
    """The configuration with this `remat`, that of its caption encoder too."""
    changes: dict[str, Any] = {"remat": choice}
    condition = getattr(model, "condition", None)
    if condition is not None and hasattr(condition, "remat"):
        changes["condition"] = condition.model_copy(update={"remat": choice})
    return model.model_copy(update=changes)


def _saved(model: Any, config: PlanBench) -> float:
    with torch.device("meta"):
        built = build_model(model).to(DTYPES[config.dtype]).train()
    return saved_bytes(built, example(model, config))


def saved_bytes(model: nn.Module, batch: TokenBatch) -> float:
    """Bytes of the storages that autograd keeps for the backward pass, parameters and the batch left out."""
    given = [*model.parameters(), *model.buffers(), batch.text, batch.codes, *batch.extra.values()]
    known = {tensor.untyped_storage()._cdata for tensor in given}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    fused = _counted_as_fused() if batch.text.is_meta else torch.enable_grad()
    with fused, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch).total
    found = float(sum(storage.nbytes() for storage in kept.values()))
    del loss
    return found


def example(model: Any, config: PlanBench) -> TokenBatch:
    """A batch of the plan's size on the meta device, with whatever the model is told."""
    size, meta = config.micro_batch_size, torch.device("meta")
    text = torch.zeros(size, model.text_seq_len, dtype=torch.long, device=meta)
    codes = torch.zeros(size, *config.code_shape, dtype=torch.long, device=meta)
    extra, condition = {}, condition_of(model)
    match condition:
        case EmbeddingsConfig():
            assert condition.width is not None
            shape = (size, model.text_seq_len, condition.width)
            extra[TEXT_EMBEDS] = torch.zeros(shape, device=meta, dtype=torch.bfloat16)
            extra[TEXT_EMBEDS_MASK] = text.bool()
        case ClassesConfig():
            extra[LABELS] = text[:, 0]
        case CaptionConfig():
            pass  # caption ids are there
        case _:
            assert_never(condition)
    positions = torch.zeros(size, dtype=torch.long, device=meta)
    return TokenBatch(positions, text, text.bool(), codes, extra=extra)


class _Fused(torch.autograd.Function):
    """Keeps what fused attention keeps: its inputs, its output and one number per query, but no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError("counted on the meta device, never run")


@contextmanager
def _counted_as_fused() -> Iterator[None]:
    """On the meta device torch takes attention apart, and would keep scores that no fused kernel keeps."""

    def fused(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Fused.apply(q, k, v)  # type: ignore[return-value]  # torch does not type `apply`

    with mock.patch.object(F, "scaled_dot_product_attention", fused):
        yield


def _row(config: PlanBench, nodes: int, part: str, need: float, target: float | None) -> dict[str, Any]:
    name = f"plan/{kind_of(config.model)}/{nodes}x{config.gpus}/{config.dtype}/{part}"
    return row(name, max(need, 1.0) / 1e9, config.gpu_bytes / 1e9, "GB", target)
