"""`bench decode`: how fast a model draws codes, by the number of images at once.

    tokscale bench decode model=dalle/small device=cuda batches=[1,8,64] cond_scale=3

The model has random weights, as an export would be loaded, and random captions; what it draws does not matter for time.
A code's time is a call's divided by the codes of one image, also where several are drawn in one step.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from pydantic import Field, PositiveInt

from tokscale.base import rng
from tokscale.base.config import Config, kind_of
from tokscale.base.errors import ConfigError
from tokscale.bench import plan
from tokscale.bench.measure import figure, interleaved, skipped
from tokscale.bench.stepping import filled, launched, no_leftovers
from tokscale.dist.device import choose_device, choose_dtype
from tokscale.models.model import GenerativeModel
from tokscale.models.registry import ModelConfig, build_model
from tokscale.nn.strides import transpose_weights_for_decoding


class DecodeBench(Config):
    """What `bench decode` measures."""

    model: ModelConfig
    """What draws, as `model=dalle/small`."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where: `cpu` (one thread's CPU time), `cuda`, or `auto`."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the weights, as `tokscale sample` has it."""
    batches: tuple[PositiveInt, ...] = (1, 8, 64)
    """Images at once; guidance doubles the work."""
    cond_scale: float = Field(default=1.0, ge=0)
    """Guidance; 1 is none."""
    rounds: int = Field(default=2, ge=1)
    """Interleaved rounds; the best counts."""
    codes: int = Field(default=8192, ge=2)
    """Entries of the codebook."""
    code_shape: tuple[PositiveInt, ...] = (16, 16)
    """Rows and columns of codes, and levels where there are some."""
    words: int = Field(default=16384, ge=2)
    """Entries of the text tokenizer."""


CONFIG = DecodeBench


def rows(config: DecodeBench) -> Iterator[dict[str, Any]]:
    """Measure, and yield the rows of the report.

    Raises:
        ConfigError: For a model that draws nothing.
    """
    device = choose_device(config.device)
    with no_leftovers(device):
        yield from _rows(config, device)


def _rows(config: DecodeBench, device: torch.device) -> Iterator[dict[str, Any]]:
    fitted = plan.fit(cast(Any, config))
    with rng.scope(0, "init", "bench"):
        model = build_model(fitted).eval().requires_grad_(False)
    if not isinstance(model, GenerativeModel):
        raise ConfigError(f"model.kind={kind_of(fitted)}: only models that draw codes decode")
    dtype = choose_dtype(config.dtype, device)
    model = model.to(device, dtype)
    transpose_weights_for_decoding(model)
    weights = "bf16" if dtype == torch.bfloat16 else "fp32"
    places, guided = torch.Size(config.code_shape).numel(), "" if config.cond_scale == 1 else "/guided"
    for number, batch in enumerate(config.batches):
        case = f"decode/{kind_of(fitted)}/b{batch}/{weights}{guided}"
        try:
            call = drawing(model, fitted, config, batch, device)
            seconds = interleaved({"ours": call}, config.rounds, device)["ours"]
        except torch.OutOfMemoryError as error:
            yield skipped(f"{case}/throughput", f"does not fit: {str(error).splitlines()[0]}")
            break
        yield figure(f"{case}/throughput", batch / seconds, "images/s")
        yield figure(f"{case}/code/time", 1e3 * seconds / places, "ms")
        if not number:
            unit = "kernels" if device.type == "cuda" else "operations"
            yield figure(f"{case}/code/launches", launched(call, device)[0] / places, unit)


def drawing(model: GenerativeModel, fitted: Any, config: Any, batch: int, device: torch.device) -> Callable[[], object]:
    """A call that draws `batch` images."""
    asked = plan.PlanBench(model=fitted, micro_batch_size=batch, code_shape=config.code_shape)
    told = filled(plan.example(fitted, asked), device, codes=config.codes, words=config.words)
    how: Any = type(model).sampling_config
    options = how(cond_scale=config.cond_scale)
    seeds = list(range(batch))

    def draw() -> None:
        with torch.inference_mode():
            model.generate_codes(told.text, told.text_mask, options=options, seeds=seeds, extra=told.extra)

    return draw
