"""One door to all engines."""

from collections.abc import Callable
from typing import TypeVar, assert_never

import torch
from torch import nn

from tokscale.base.log import logger
from tokscale.base.protocols import Engine
from tokscale.dist.comm import Comm
from tokscale.engine.config import EagerConfig, OptimizerConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.eager import EagerEngine
from tokscale.engine.schedule import Schedule
from tokscale.engine.zero import ZeroEngine

log = logger("engine")
_Config = TypeVar("_Config", bound=EagerConfig | ZeroConfig)


def build_engine(
    name: str,
    make_model: Callable[[], nn.Module],
    *,
    config: EagerConfig | ZeroConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    comm: Comm,
    micro_batches: int,
    micro_batch_size: int,
    total_steps: int,
) -> Engine:
    """Build the engine that `config` asks for. Collective.

    Args:
        name: The engine's name within its task, e.g. `generator`.
        make_model: Makes the model, under a random stream of its own. The engine calls it once, because it may have
            to divide parameters while they are being made.
        config: Which engine.
        optimizer: Which optimizer.
        schedule: The learning rate over the run.
        comm: The job.
        micro_batches: Backward passes per step.
        micro_batch_size: Samples of one micro batch on one rank.
        total_steps: Updates of the whole run.

    Raises:
        ConfigError: When the options contradict each other or the length of the run.
        EnvironmentRefused: When the machine cannot do it.
    """
    config = resolve_auto_dtype(config, comm)
    plan = Schedule(schedule, total_steps)
    common = {"optimizer": optimizer, "schedule": plan, "comm": comm, "micro_batches": micro_batches}
    match config:
        case EagerConfig():
            return EagerEngine(name, make_model, config=config, **common)
        case ZeroConfig():
            return ZeroEngine(name, make_model, config=config, micro_batch_size=micro_batch_size, **common)
        case _:
            assert_never(config)


def resolve_auto_dtype(config: _Config, comm: Comm) -> _Config:
    """`config` with `dtype=auto` replaced by what every rank's device computes natively. Collective."""
    if config.dtype != "auto":
        return config
    dtype = "fp32" if comm.max(float(not computes_bf16(comm.device))) else "bf16"
    log.info("engine.dtype=auto: %s", dtype)
    return config.model_copy(update={"dtype": dtype})


def computes_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 have a kernel of their own on this device, and not a slow stand-in."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
