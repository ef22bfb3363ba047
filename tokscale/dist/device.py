"""Which device a process computes on, and in which type an export's weights are used there."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tokscale.base.config import did_you_mean
from tokscale.base.errors import ConfigError, EnvironmentRefused

if TYPE_CHECKING:
    import torch

_NVIDIA_SMI_SECONDS = 30
_HIDDEN = ("", "-1", "NoDevFiles")
"""Values of `CUDA_VISIBLE_DEVICES` that show no GPU."""
_GIVEN = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES")


def choose_device(name: str = "auto", local_rank: int = 0) -> "torch.device":
    """The device that a `device` key names.

    Args:
        name: `cpu`, `cuda` (this task's GPU), `cuda:1`, or `auto`: CUDA when there is one. `DS_ACCELERATOR=cpu` in the
            environment makes `auto` the CPU.
        local_rank: Of this process among those of its node. A task that sees one GPU uses that one, whatever it is.

    Raises:
        ConfigError: When there is no device of that name.
        EnvironmentRefused: When CUDA is asked for and is not there; or when this job was given GPUs that torch does not
            see, which `auto` would compute without.
    """
    import torch  # heavy, and listing the stages imports this module

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device: got {name!r}{did_you_mean(name, ('auto', 'cpu', 'cuda', 'cuda:1'))}")
    if name == "cpu" or (name == "auto" and os.environ.get("DS_ACCELERATOR") == "cpu"):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        given = gpus_given()
        if name == "auto" and given is None:
            return torch.device("cpu")
        reason = f"device: this job was given GPUs ({given})" if name == "auto" else f"device={name}"
        raise EnvironmentRefused(f"{reason}, but torch sees none: {_why_none()}; or compute on the CPU with device=cpu")
    count = torch.cuda.device_count()
    index = int(name.partition(":")[2] or (0 if count == 1 else local_rank))
    if index >= count:
        asked = f"device={name}" if ":" in name else f"local rank {local_rank}"
        raise EnvironmentRefused(
            f"{asked}: this process sees {count} GPU(s), numbered from 0; start as many tasks a node as it has GPUs, or "
            "one GPU a task"
        )
    return torch.device("cuda", index)


def gpus_given(environ: Mapping[str, str] = os.environ) -> str | None:
    """What says that this process was given GPUs, for a message; None where nothing does, or they are hidden."""
    if environ.get("CUDA_VISIBLE_DEVICES", "0") in _HIDDEN:
        return None
    for name in _GIVEN:
        value = environ.get(name, "")
        if value not in _HIDDEN and (name, value) != ("SLURM_GPUS_ON_NODE", "0"):
            return f"{name}={value}"
    listed = [line for line in _nvidia_smi("-L").splitlines() if line.startswith("GPU ")]
    return f"nvidia-smi lists {len(listed)}" if listed else None


def choose_dtype(name: str, device: "torch.device") -> "torch.dtype | None":
    """The type of an export's weights in use: that of `name`, or None for as they are stored.

    `auto` is bf16 on a GPU that computes it, where a token costs what it takes to read the weights.
    """
    import torch

    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else None
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def _why_none() -> str:
    import torch

    if torch.version.cuda is None:
        return f"the wheel torch {torch.__version__} is built without CUDA; install one that is (pytorch.org says how)"
    driver = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0].strip()
    found = f"the driver here is {driver}" if driver else "nvidia-smi finds no driver"
    return (
        f"the wheel torch {torch.__version__} is built for CUDA {torch.version.cuda} and {found}; renew the driver, or "
        "install the wheel of an older CUDA"
    )


def _nvidia_smi(*words: str) -> str:
    """What it prints; nothing where it is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        told = subprocess.run([program, *words], capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    return told.stdout if told.returncode == 0 else ""
