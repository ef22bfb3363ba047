"""Which model, tokenizer and number of steps suit a data set, a machine and some hours.

Arithmetic decides how long: a training step's floating-point operations are known, and what the machine does in a
second is measured by a product of matrices. Memory decides how large: state as `bench plan` counts it, activations by
a formula.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from tokscale.base.config import decode
from tokscale.bench.memory import state_bytes
from tokscale.bench.plan import PlanBench, fit
from tokscale.data.raw.survey import Survey
from tokscale.models.registry import ModelConfig, build_model
from tokscale.tokenizers.image import IMAGE_TOKENIZERS

_SIZES = (  # dim, depth, heads, dim_head, learning rate
    (128, 4, 4, 32, 2e-3),
    (192, 4, 6, 32, 2e-3),
    (256, 8, 8, 32, 1e-3),
    (512, 12, 8, 64, 6e-4),
    (768, 16, 12, 64, 4e-4),
    (1024, 24, 16, 64, 3e-4),
)
"""From the quickstart's model to 300 million weights, with learning rates that train at that width."""
_EFFICIENCY = 0.35
"""Share of a product of matrices that training reaches; on CPUs and GPUs between 0.25 and 0.5."""
_FEW, _MANY = 300, 200_000
"""Steps of any training: fewer learn nothing, and more are chosen by hand."""
_ENOUGH = 2000
"""Steps that a larger model must get to be worth it."""
_EPOCHS = 200
"""Images are seen so often at most."""
_MEMORY_SHARE = 0.8
_PRODUCTS = 8
"""Of matrices, by which a machine's speed is measured: about a third of a second."""
_LARGEST_GRID = {32: 4, 64: 8, 128: 8, 256: 16}
"""By image size: pixels of one code's side."""


@dataclass(frozen=True)
class Machine:
    """What trains."""

    device: str
    memory: float
    """Bytes for training."""
    flops: float
    """Floating-point operations a second that a product of matrices reaches."""


@dataclass(frozen=True)
class Choice:
    """What was chosen."""

    image_size: int
    tokenizer: dict[str, Any]
    tokenizer_steps: int
    model: dict[str, Any]
    parameters: int
    steps: int
    batch_size: int
    lr: float
    need: float
    """Bytes of training the model."""
    hours: float
    """Of both trainings, as estimated."""


def choose(survey: Survey, kind: str, machine: Machine, hours: float, *, image_size: int | None, words: int) -> Choice:
    """Everything that has a size.

    Args:
        survey: Of the data.
        kind: Of the model.
        machine: What trains.
        hours: For both trainings together.
        image_size: Side of the images; by default what the data and the machine allow.
        words: `text_seq_len`.
    """
    side = image_size or _image_size(survey, machine, hours)
    batch = 64 if machine.device == "cuda" else 32
    tokenizer = _tokenizer(side, survey.images, residual=kind == "rqtransformer", wide=machine.device == "cuda")
    config = decode(IMAGE_TOKENIZERS[tokenizer["kind"]].config_class, tokenizer)
    with torch.device("meta"):
        codec: Any = IMAGE_TOKENIZERS[tokenizer["kind"]](config)
    speed = machine.flops * _EFFICIENCY
    tokenizer_step = batch * codec.train_flops() / speed
    tokenizer_steps = _steps(0.3 * hours * 3600 / tokenizer_step, survey.images, batch)
    left = max(hours * 3600 - tokenizer_steps * tokenizer_step, 0.3 * hours * 3600)
    best: Choice | None = None
    for dim, depth, heads, dim_head, lr in _SIZES:
        values = _model(kind, survey, words, dim, depth, heads, dim_head)
        plan = decode(
            PlanBench,
            {
                "model": values,
                "dtype": "bf16" if machine.device == "cuda" else "fp32",
                "micro_batch_size": batch,
                "codes": codec.num_tokens,
                "code_shape": codec.code_shape,
                "words": 16384,
            },
        )
        fitted = fit(plan)
        with torch.device("meta"):
            network = build_model(decode(ModelConfig, fitted))
        tokens = math.prod(codec.code_shape) + (words if survey.captions else 1)
        kept = batch * _kept_bytes(dim, depth, heads, tokens) * (1 if machine.device == "cuda" else 2)
        need = sum(state_bytes(network, plan.optim, plan.dtype, 1).values()) + kept
        parameters = sum(parameter.numel() for parameter in network.parameters())
        seconds = batch * network.train_flops() / speed
        affordable = left / seconds
        if best is not None and not (
            need < _MEMORY_SHARE * machine.memory
            and affordable >= _ENOUGH
            and parameters < 100 * survey.images * math.prod(codec.code_shape)
        ):
            break
        steps = _steps(affordable, survey.images, batch)
        spent = (steps * seconds + tokenizer_steps * tokenizer_step) / 3600
        best = Choice(side, tokenizer, tokenizer_steps, values, parameters, steps, batch, lr, need, spent)
    assert best is not None
    return best


def this_machine(device: torch.device, flops: float | None) -> Machine:
    """The machine of this process, its speed measured when it is not given."""
    if device.type == "cuda":
        memory = float(torch.cuda.get_device_properties(device).total_memory)
    else:
        memory = float(_available_memory())
    return Machine(device.type, memory, flops or _measured_flops(device))


def _image_size(survey: Survey, machine: Machine, hours: float) -> int:
    sides = sorted(min(size) for size in survey.sizes)
    most = sides[len(sides) // 2]
    allowed = 256 if machine.device == "cuda" else 32 if hours < 4 else 64
    return max((side for side in _LARGEST_GRID if side <= min(most, allowed)), default=min(_LARGEST_GRID))


def _steps(affordable: float, images: int, batch: int) -> int:
    wanted = max(_EPOCHS * images // batch, _ENOUGH)
    steps = int(min(max(affordable, _FEW), wanted, _MANY))
    return max(steps // 100 * 100, _FEW)


def _tokenizer(side: int, images: int, *, residual: bool, wide: bool) -> dict[str, Any]:
    reduction = _LARGEST_GRID[side]
    codes = 256 if images < 20_000 else 1024 if images < 500_000 else 8192
    quantizer: dict[str, Any] = {"kind": "vq", "num_tokens": codes, "dim": 32, "decay": 0.95, "revive_every": 20}
    if residual:
        quantizer |= {"kind": "residual", "levels": 4, "shared_codebook": False}
    layers = reduction.bit_length() - 1
    return {
        "kind": "vqgan",
        "image_size": side,
        "network": {"kind": "resnet", "dim": 64 if wide else 32, "layers": layers, "num_resnet_blocks": 1},
        "quantizer": quantizer,
        "l1_weight": 1.0,
        "l2_weight": 1.0,
    }


def _model(kind: str, survey: Survey, words: int, dim: int, depth: int, heads: int, dim_head: int) -> dict[str, Any]:
    condition: dict[str, Any] = {"kind": "caption", "depth": 2, "heads": heads, "dim_head": dim_head}
    told: dict[str, Any] = {"condition": condition, "text_seq_len": words, "cond_drop_prob": 0.1}
    if survey.classes is not None:
        told = {"condition": {"kind": "classes", "num_classes": len(survey.classes)}, "cond_drop_prob": 0.1}
    elif not survey.captions:
        told = {}
    own: dict[str, dict[str, Any]] = {
        "dalle": {
            "depth": depth,
            "text_seq_len": words,
            "attn_types": ["full", "axial_row", "axial_col", "full"],
            "rotary_emb": False,
            "shift_tokens": True,
            "null_cond_prob": 0.1,
        },
        "maskgit": {"depth": depth, **(told or {"condition": {"kind": "none"}})},
        "parti": {"depth": depth, "max_text_len": words, "condition": condition, "multi_query": False},
        "rqtransformer": {
            "spatial_layers": depth,
            "depth_layers": 2,
            "shared_code_emb": False,
            "shift_tokens": True,
            **told,
        },
    }
    return {"kind": kind, "dim": dim, "heads": heads, "dim_head": dim_head, **own[kind]}


def _kept_bytes(dim: int, depth: int, heads: int, tokens: int) -> float:
    """What the backward pass of one sample needs in bf16 (Korthikanti et al. 2022, arXiv:2205.05198, section 4)."""
    return depth * tokens * (34 * dim + 5 * heads * tokens)


def _available_memory() -> int:
    with open("/proc/meminfo") as file:
        values = dict(line.split(":") for line in file)
    return int(values["MemAvailable"].split()[0]) * 1024


def _measured_flops(device: torch.device) -> float:
    """Of single-precision products, bf16 on a GPU: the fastest of several, whatever else the machine does just now.

    On a CPU by the time that its threads computed, which others who want the same cores do not lengthen.
    """
    gpu = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    clock, threads = (time.perf_counter, 1) if gpu else (time.process_time, torch.get_num_threads())
    left = torch.ones(side, side, device=device, dtype=dtype)
    _ = (left @ left)[0, 0].item()
    best = math.inf
    for _ in range(_PRODUCTS):
        begin = clock()
        _ = (left @ left)[0, 0].item()
        best = min(best, max(clock() - begin, 1e-9) / threads)
    return 2 * side**3 / best
