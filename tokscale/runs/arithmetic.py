"""In which arithmetic a run computes: chosen once, written into its folder, and kept wherever it goes on."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from tokscale.base.files import read_json, storage_errors, write_json
from tokscale.base.log import logger
from tokscale.dist.comm import Comm
from tokscale.engine.build import computes_bf16, resolve_auto_dtype
from tokscale.engine.config import EagerConfig, ZeroConfig

ARITHMETIC_FILE = "arithmetic.json"
_MEMORY: Any = torch.utils.deterministic
"""Its one switch is a property that type checkers do not see."""
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"

log = logger("run")
_Config = TypeVar("_Config", bound=EagerConfig | ZeroConfig)


def recorded_dtype(folder: Path) -> str | None:
    """The arithmetic that a run folder records; None before a run has chosen one."""
    path = folder / ARITHMETIC_FILE
    return read_json(path)["dtype"] if path.exists() else None


def keep_dtype(folder: Path, there: Mapping[str, Any]) -> None:
    """Record what an earlier start of the run named, before its configuration is written anew."""
    dtype = there.get("engine", {}).get("dtype")
    if dtype in ("fp32", "bf16") and recorded_dtype(folder) is None:
        write_json(folder / ARITHMETIC_FILE, {"dtype": dtype})


def in_recorded_arithmetic(folder: Path, config: _Config, comm: Comm) -> _Config:
    """An engine's configuration with `dtype=auto` replaced by what the folder records, or else by what is chosen now.

    Collective. What is chosen is recorded, so that another machine goes on in the same arithmetic.
    """
    recorded = comm.on_main(f"looking into {folder}", lambda: recorded_dtype(folder))
    if config.dtype == "auto" and recorded is not None:
        config = config.model_copy(update={"dtype": recorded})
        if recorded == "bf16" and not computes_bf16(comm.device):
            log.warning("%s goes on in bf16, as it began; this device has no bf16 products of its own", folder)
    config = resolve_auto_dtype(config, comm)
    if comm.is_main and recorded != config.dtype:
        with storage_errors(folder):
            write_json(folder / ARITHMETIC_FILE, {"dtype": config.dtype})
    return config


@contextmanager
def arithmetic(device: torch.device, *, tf32: bool, deterministic: bool) -> Iterator[None]:
    """Inside, products of fp32 numbers on CUDA use TF32 or do not, and algorithms are deterministic or the fastest.

    Determinism wants everything exact: no TF32, a fixed workspace of cuBLAS, and an error from any operation that has
    no deterministic algorithm. On the CPU results are the same from run to run either way.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    algorithms, filled = (
        torch.are_deterministic_algorithms_enabled(),
        _MEMORY.fill_uninitialized_memory,
    )
    workspace = os.environ.get(_WORKSPACE)
    try:
        if device.type == "cuda":  # a CPU may have its own idea of high precision
            torch.set_float32_matmul_precision("high" if tf32 and not deterministic else "highest")
            torch.backends.cudnn.allow_tf32 = tf32 and not deterministic
        if deterministic:
            os.environ.setdefault(_WORKSPACE, ":4096:8")
            torch.use_deterministic_algorithms(True)
            _MEMORY.fill_uninitialized_memory = False  # nothing reads it
        yield
    finally:
        if device.type == "cuda":
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]
        torch.use_deterministic_algorithms(algorithms)
        _MEMORY.fill_uninitialized_memory = filled
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
