"""`bench train`: how fast a model trains on one device, in which setting best, and in how much of the planned memory.

    tokscale bench train model=parti/paper_750m device=cuda out=train.json

A step is forward, backward and update through an engine, as `tokscale train` takes it, on one batch of random ids that
lies on the device already. Each value of `remat` is tried with growing micro batches until one does not fit; the other
choices are then tried at the best of these. MFU is given by two conventions: `mfu` counts of attention the pairs of
positions that see each other (the causal half, the window), `mfu-full` counts all pairs, as PaLM did. Both are over the
vendor's figure for the arithmetic that could have been used; on a CPU, whose clock nobody fixes, over the speed of a
large matrix product. Memory is the peak of what tensors hold, beside what `bench plan` says.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from pydantic import Field, PositiveInt

from tokscale.base.config import Config, decode, encode, kind_of
from tokscale.base.errors import ConfigError
from tokscale.base.protocols import LossModel
from tokscale.bench import plan
from tokscale.bench.measure import figure, interleaved, one_thread, row, seconds_of, skipped
from tokscale.bench.memory import state_bytes
from tokscale.bench.stepping import Peak, Stepper, filled, full_train_flops, host_waits, launched, no_leftovers
from tokscale.dist.comm import Comm
from tokscale.dist.device import choose_device
from tokscale.dist.env import ProcessEnv
from tokscale.engine.build import resolve_auto_dtype
from tokscale.engine.config import AdamWConfig, OptimizerConfig, TrainingEngineConfig, ZeroConfig
from tokscale.models.registry import ModelConfig, build_model
from tokscale.runs.arithmetic import arithmetic
from tokscale.train.hardware import arithmetic_here, peak_flops_here

TERA = 1e12
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


class TrainBench(Config):
    """What `bench train` measures."""

    model: ModelConfig
    """What trains, as `model=parti/paper_750m`."""
    engine: TrainingEngineConfig = ZeroConfig(dtype="auto")
    """Where state lives and in which precision; the memory of ZeRO stage 3 is what `bench plan` says."""
    optim: OptimizerConfig = AdamWConfig()
    """What moves the weights."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where: `cpu` (one thread's CPU time), `cuda`, or `auto`."""
    micro_batch_sizes: tuple[PositiveInt, ...] = (8, 16, 32, 64)
    """Samples of a step, tried in this order until so many do not fit."""
    remats: tuple[str, ...] = ()
    """Values of the model's `remat`; none given: all that it knows."""
    backends: tuple[str, ...] = ()
    """Values of the model's `attn_backend` to be tried beside the configured one."""
    compile: tuple[bool, ...] = ()
    """Values of the engine's `compile` to be tried beside the configured one."""
    deterministic: bool = False
    """On CUDA: with deterministic algorithms and no TF32, to see what they cost."""
    steps: int = Field(default=10, ge=1)
    """Steps that are timed together."""
    warm_steps: int = Field(default=3, ge=1)
    """Steps before them."""
    codes: int = Field(default=8192, ge=2)
    """Entries of the codebook."""
    code_shape: tuple[PositiveInt, ...] = (32, 32)
    """Rows and columns of codes, and levels where there are some."""
    words: int = Field(default=16384, ge=2)
    """Entries of the text tokenizer."""


CONFIG = TrainBench


@dataclass(frozen=True)
class Setting:
    """One way to train the model."""

    model: Any
    """Fitted configuration."""
    engine: Any
    micro_batch: int

    @property
    def said(self) -> str:
        """Its choices, as they stand in the names of rows."""
        words = [f"b{self.micro_batch}", f"remat-{getattr(self.model, 'remat', 'none')}"]
        for key in ("attn_backend", "compile"):
            value = getattr(self.model, key, getattr(self.engine, key, "auto"))
            words += [f"{key.replace('_', '-')}-{str(value).lower()}"] if value != "auto" else []
        return "/".join([*words, self.engine.dtype, self.engine.said])


@dataclass(frozen=True)
class Trained:
    """What steps in one setting took."""

    seconds: float
    """Of one step."""
    tokens: int
    """Of one step: words and codes."""
    flops: float
    """Of one step, by the pairs of positions that see each other."""
    full_flops: float
    """Of one step, by all pairs."""
    peak: float
    """Bytes that tensors held at most in a step after the first."""
    launches: int
    """Kernels of a step; on a CPU, operations."""
    idle: float | None
    """Share of a step in which the device ran no kernel; None on a CPU."""
    waits: int | None
    """How often the host waits for the device in a step; None on a CPU."""


def rows(config: TrainBench) -> Iterator[dict[str, Any]]:
    """Measure, and yield the rows of the report; the last ones repeat the fastest setting's.

    Raises:
        ConfigError: When `compile` is to be tried of an engine that has no such key.
    """
    if config.compile and "compile" not in type(config.engine).model_fields:
        raise ConfigError(f"compile: engine.kind={kind_of(config.engine)} has no key of that name; leave it out")
    device = choose_device(config.device)
    with arithmetic(device, tf32=config.engine.tf32, deterministic=config.deterministic):
        sweep = _Sweep(config, Comm(ProcessEnv(), device))
        for model in sweep.models():
            for size in config.micro_batch_sizes:
                yield from sweep.tried(Setting(model, sweep.engine, size))
                if not sweep.fitted:
                    break
        for setting in sweep.further():
            yield from sweep.tried(setting)
    yield from sweep.best_rows()


class _Sweep:
    """Settings that are tried one after another, and the fastest so far."""

    def __init__(self, config: TrainBench, comm: Comm):
        self._config, self._comm = config, comm
        self.engine: Any = resolve_auto_dtype(config.engine, comm)
        self._model: Any = plan.fit(cast(Any, config))
        self._prefix = f"train/{kind_of(config.model)}"
        self._peak = peak_here(comm.device, self.engine.dtype)
        self._best: tuple[float, Setting, list[dict[str, Any]]] | None = None
        self.fitted = True
        """Whether the last setting did not ask for more memory than there is."""

    def models(self) -> list[Any]:
        """The model under each `remat` that is asked for."""
        if "remat" not in type(self._model).model_fields:
            return [self._model]
        choices = self._config.remats or plan.remat_choices(self._model)
        return [plan.with_remat(self._model, choice) for choice in choices]

    def further(self) -> Iterator[Setting]:
        """The best setting with another of the choices beside `remat`."""
        if self._best is None:
            return
        setting = self._best[1]
        if "attn_backend" in type(setting.model).model_fields:
            for name in self._config.backends:
                model = decode(type(setting.model), encode(setting.model) | {"attn_backend": name})
                yield replace(setting, model=model)
        for value in self._config.compile:
            yield replace(setting, engine=decode(type(setting.engine), encode(setting.engine) | {"compile": value}))

    def tried(self, setting: Setting) -> Iterator[dict[str, Any]]:
        """The rows of a setting."""
        name = f"{self._prefix}/{setting.said}"
        self.fitted = True
        try:
            found = trained(self._config, self._comm, setting)
        except torch.OutOfMemoryError as error:
            self.fitted = False
            yield skipped(f"{name}/step", f"does not fit: {str(error).splitlines()[0]}")
            return
        told = list(self._rows(name, setting, found))
        yield from told
        rate = found.tokens / found.seconds
        if self._best is None or rate > self._best[0]:
            self._best = rate, setting, told

    def best_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of the fastest setting, marked as the best."""
        for entry in self._best[2] if self._best is not None else ():
            yield entry | {"name": entry["name"].replace(f"{self._prefix}/", f"{self._prefix}/best/", 1)}

    def _rows(self, name: str, setting: Setting, found: Trained) -> Iterator[dict[str, Any]]:
        device = self._comm.device
        of = f"{arithmetic_here(device, setting.engine.dtype)}-{'peak' if device.type == 'cuda' else 'matmul'}"
        yield figure(f"{name}/step/throughput", found.tokens / found.seconds, "tokens/s")
        for which, flops in (("mfu", found.flops), ("mfu-full", found.full_flops)):
            reached = flops / found.seconds / TERA
            yield row(f"{name}/{which}/vs-{of}", reached, self._peak / TERA, "TFLOP/s", more_is_better=True)
        if setting.engine.shards_weights:
            planned = planned_bytes(self._config, setting)
            yield row(f"{name}/step/vs-plan/memory", found.peak / 1e9, planned / 1e9, "GB")
        else:
            yield figure(f"{name}/step/memory", found.peak / 1e9, "GB")
        yield figure(f"{name}/step/launches", found.launches, "kernels" if device.type == "cuda" else "operations")
        if found.idle is not None:
            yield figure(f"{name}/step/idle", found.idle, "of a step")
        if found.waits is not None:
            yield figure(f"{name}/step/host-waits", found.waits, "waits")


def peak_here(device: torch.device, dtype: str) -> float:
    """FLOP/s that products could reach: the vendor's figure, or what a large one reaches where there is none."""
    peak = peak_flops_here(device, dtype)
    if peak is not None:
        return peak
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.ones(size, size, dtype=DTYPES[dtype], device=device) for _ in range(2))
    return 2 * size**3 / interleaved({"matmul": lambda: a @ b}, 10, device)["matmul"]


def planned_bytes(config: Any, setting: Setting) -> float:
    """What `bench plan` says that this setting needs on one rank."""
    asked = plan.PlanBench(
        model=setting.model,
        optim=config.optim,
        dtype=setting.engine.dtype,
        micro_batch_size=setting.micro_batch,
        codes=config.codes,
        code_shape=config.code_shape,
        words=config.words,
    )
    with torch.device("meta"):
        model = build_model(setting.model)
    state = sum(state_bytes(model, config.optim, setting.engine.dtype, 1, len(setting.engine.ema)).values())
    return state + max(plan.step_need(setting.model, asked, getattr(setting.model, "remat", "none")))


def trained(config: Any, comm: Comm, setting: Setting) -> Trained:
    """Build, warm up and measure one setting; nothing of it stays on the device.

    Raises:
        OutOfMemoryError: Of torch, where it does not fit.
    """
    device = comm.device
    with no_leftovers(device):
        return _trained(config, comm, setting)


def _trained(config: Any, comm: Comm, setting: Setting) -> Trained:
    device = comm.device
    with Peak(device) as peak:
        some = plan.example(setting.model, _sized(config, setting))
        batch = filled(some, device, codes=config.codes, words=config.words)
        step = Stepper(setting.model, setting.engine, config.optim, comm, batch)
        for number in range(config.warm_steps):
            if number == 1:
                peak.restart()
            step()
    model = cast(LossModel, step.engine.model)
    with one_thread() if device.type == "cpu" else nullcontext():
        seconds = seconds_of(lambda: [step() for _ in range(config.steps)], device) / config.steps
    launches, idle = launched(step, device)
    return Trained(
        seconds=seconds,
        tokens=batch.text.numel() + batch.codes.numel(),
        flops=model.train_flops() * setting.micro_batch,
        full_flops=full_train_flops(model) * setting.micro_batch,
        peak=peak.bytes(),
        launches=launches,
        idle=idle,
        waits=host_waits(step, device),
    )


def _sized(config: Any, setting: Setting) -> Any:
    asked = {name: getattr(config, name) for name in ("codes", "code_shape", "words")}
    return plan.PlanBench(model=setting.model, micro_batch_size=setting.micro_batch, **asked)
