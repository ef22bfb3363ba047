"""`bench plan`: what training a model under ZeRO-3 takes of each GPU's memory, before any GPU is asked for.

    tokscale bench plan model=parti/paper_20b optim=adafactor nodes=[2,4,8]

State is counted from the parameters' shapes; what forward and backward need beside it, on the meta device, where
nothing is computed, once for each choice of `remat` (`bench.memory`). A row's ratio is how many times the need fits
into the GPU. Not counted: the working memory of kernels, the allocator's loss, and the few hundred megabytes of the
CUDA context.
"""

import fnmatch
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, assert_never, get_args

import torch
from pydantic import Field, PositiveInt

from tokscale.base.batch import LABELS, TEXT_EMBEDS, TEXT_EMBEDS_MASK, TokenBatch
from tokscale.base.config import PathKey, kind_of
from tokscale.base.errors import ConfigError
from tokscale.base.log import logger
from tokscale.bench.measure import figure, row, skipped
from tokscale.bench.memory import Need, gathered_bytes, state_bytes, step_peak
from tokscale.bench.plan_machine import with_machine
from tokscale.bench.plan_time import DRAWN, TimeConfig, days, draw, travel
from tokscale.bench.planning import Planning
from tokscale.engine.config import AdamWConfig, OptimizerConfig
from tokscale.engine.groups import freeze
from tokscale.models.common import condition_of
from tokscale.models.grids import most_codes
from tokscale.models.registry import ModelConfig, build_model
from tokscale.nn.conditioning import CaptionConfig, ClassesConfig, EmbeddingsConfig, NothingConfig

log = logger("bench")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PlanBench(TimeConfig):
    """What `bench plan` is asked."""

    model: ModelConfig
    """What is to be trained, as `model=parti/paper_20b`."""
    optim: OptimizerConfig = AdamWConfig()
    """What moves the weights; decides how large the moments are."""
    dtype: str = Field(default="bf16", pattern="^(fp32|bf16)$")
    """Of parameters and activations."""
    freeze: tuple[str, ...] = ()
    """As for `train`: patterns of parameters that are not trained, which then have no gradients, masters and moments.
    Times are those of training everything."""
    ema: int = Field(default=0, ge=0)
    """Averages of the weights that the engine keeps."""
    nodes: tuple[PositiveInt, ...] = (1, 2, 4, 8)
    """Numbers of machines."""
    gpus: int = Field(default=8, ge=1)
    """GPUs of a machine."""
    gpu_bytes: float = Field(default=141e9, gt=0)
    """Memory of one; an H200 has 141 GB."""
    gpu_report: PathKey | None = None
    """Folder that `bench gpu` wrote: its memory, speed of products and of copies take the place of the defaults of
    `gpu_bytes`, `peak_flops`, `efficiency`, `memory_bandwidth` and `host_bandwidth`, but not of what is given here."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Samples of one forward pass on one GPU."""
    codes: int = Field(default=8192, ge=2)
    """Entries of the codebook."""
    code_shape: tuple[PositiveInt, ...] = (32, 32)
    """Rows and columns of codes, and levels where there are some."""
    grids: tuple[tuple[PositiveInt, PositiveInt], ...] = ()
    """Rows and columns of codes of each shape of images, in a run of several, in place of those of `code_shape`: tables
    are those of the largest, memory that of the one with the most codes, arithmetic the mean of all."""
    words: int = Field(default=16384, ge=2)
    """Entries of the text tokenizer."""


CONFIG = PlanBench


def rows(config: PlanBench) -> Iterator[dict[str, Any]]:
    """Count. `ours` is GB on one GPU, `baseline` what the GPU has.

    Raises:
        DataError: When `gpu_report` is no report of `bench gpu`.
    """
    if config.gpu_report is not None:
        config = with_machine(config, config.gpu_report, config.dtype)
    config = costliest(config)
    fitted = fit(config)
    with torch.device("meta"):
        model = freeze(build_model(fitted), config.freeze)
    needs = {choice: step_need(fitted, config, choice) for choice in remat_choices(fitted)}
    for nodes in config.nodes:
        ranks = nodes * config.gpus
        state = state_bytes(model, config.optim, config.dtype, ranks, config.ema)
        for part, size in state.items():
            if size:
                yield _row(config, nodes, part, size, None)
        for choice, need in needs.items():
            gathered = gathered_bytes(model, config.dtype, ranks, need)
            yield _row(config, nodes, f"activations-remat-{choice}", max(need), None)
            yield _row(config, nodes, f"gathered-remat-{choice}", gathered, None)
            yield _row(config, nodes, f"total-remat-{choice}", sum(state.values()) + max(need) + gathered, None)
    yield from _timed(config, planning(config))


def planning(config: PlanBench) -> Planning:
    """The plan with its model looked at; `header` is what recipes say about themselves."""
    config = costliest(config)
    fitted = fit(config)
    return Planning(config, fitted, remat_choices(fitted), step_need)


def costliest(config: PlanBench) -> PlanBench:
    """Of several shapes of images, the plan for the one with the most codes."""
    if not config.grids:
        return config
    return config.model_copy(update={"code_shape": (*most_codes(config.grids), *config.code_shape[2:])})


def _timed(config: PlanBench, planned: Planning) -> Iterator[dict[str, Any]]:
    """Seconds, of which `baseline` are those without communication, and what follows from them."""
    counts = [nodes * config.gpus for nodes in config.nodes]
    for line in planned.header(counts):
        log.info(line)
    for nodes, gpus in zip(config.nodes, counts, strict=True):
        name = f"plan/{kind_of(config.model)}/{nodes}x{config.gpus}/{config.dtype}"
        for remat in planned.remats:
            size = float(planned.largest(gpus, remat))
            yield row(f"{name}/largest-micro-batch-remat-{remat}", size, 1.0, "samples", None, more_is_better=True)
        found = planned.best(gpus)
        if found is None:
            yield skipped(f"{name}/step", "nothing fits, or the batch does not divide; see the log")
            continue
        choice, time = found
        alone = time.seconds - time.exposed_gather - time.exposed_reduce
        yield row(f"{name}/step", time.seconds, alone, "s", None)
        for part in ("compute", "exposed_gather", "exposed_reduce", "optimizer", "save"):
            yield row(f"{name}/step-{part.replace('_', '-')}", max(getattr(time, part), 1e-9), time.seconds, "s", None)
        if gpus > 1:
            moved, unit = travel(choice.micro_batches, hpz=choice.hpz), "times all parameters a micro-batch"
            for part in ("across", "inside", "reduced"):
                often = getattr(moved, part) / choice.micro_batches
                title = "reductions" if part == "reduced" else f"gathers-{part}"
                yield figure(f"{name}/{title}", often, unit)
        yield row(f"{name}/mfu", time.mfu, config.efficiency, "of peak", None, more_is_better=True)
        yield row(f"{name}/tokens", time.tokens_per_second, 1.0, "tokens/s", None, more_is_better=True)
        if config.tokens:
            yield row(f"{name}/days", days(time, config.tokens), 1.0, "days", None)
            yield row(f"{name}/gpu-hours", 24 * gpus * days(time, config.tokens), 1.0, "hours", None)
    if config.figure is not None:
        draw({gpus: planned.best(gpus) for gpus in DRAWN}, kind_of(config.model), config.figure)


def fit(config: PlanBench) -> Any:
    """The model's configuration with its sizes taken from those of the plan.

    Raises:
        ConfigError: For a model of images.
    """
    if not hasattr(config.model, "image_grid") and not hasattr(config.model, "num_image_tokens"):
        raise ConfigError(f"model.kind={kind_of(config.model)}: only models of image codes can be planned")
    image = SimpleNamespace(num_tokens=config.codes, code_shape=config.code_shape, image_size=0, channels=3)
    model: Any = config.model
    fitted = model.fitted(image, SimpleNamespace(num_tokens=config.words))
    grids = getattr(config, "grids", ())  # of a plan; what is measured has one shape
    return fitted.with_grids(grids) if grids else fitted


def remat_choices(model: Any) -> list[str]:
    """The values of `remat` that a model's configuration knows."""
    return list(get_args(type(model).model_fields["remat"].annotation))


def step_need(model: Any, config: PlanBench, choice: str) -> Need:
    """Bytes that forward and backward of one micro batch need beside the state.

    Args:
        model: Fitted configuration.
        config: The plan.
        choice: Value of `remat`.
    """
    chosen = with_remat(model, choice)
    with torch.device("meta"):
        built = build_model(chosen).to(DTYPES[config.dtype]).train()
    names = [name for name, _ in built.named_parameters()]
    # A model of fewer layers, which is looked at in place of the whole one, need not have them all.
    freeze(built, [pattern for pattern in config.freeze if fnmatch.filter(names, pattern)])
    return step_peak(built, example(chosen, config))


def with_remat(model: Any, choice: str) -> Any:
    """The configuration with this `remat`, that of its caption encoder too."""
    changes: dict[str, Any] = {"remat": choice}
    condition = getattr(model, "condition", None)
    if condition is not None and hasattr(condition, "remat"):
        changes["condition"] = condition.model_copy(update={"remat": choice})
    return model.model_copy(update=changes)


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
        case CaptionConfig() | NothingConfig():
            pass  # caption ids are there
        case _:
            assert_never(condition)
    positions = torch.zeros(size, dtype=torch.long, device=meta)
    return TokenBatch(positions, text, text.bool(), codes, extra=extra)


def _row(config: PlanBench, nodes: int, part: str, need: float, target: float | None) -> dict[str, Any]:
    name = f"plan/{kind_of(config.model)}/{nodes}x{config.gpus}/{config.dtype}/{part}"
    return row(name, max(need, 1.0) / 1e9, config.gpu_bytes / 1e9, "GB", target)
