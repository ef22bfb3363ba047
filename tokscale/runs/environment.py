"""What a run was made with: versions, machine and the variables that matter, for `env.json`."""

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import tokscale
from tokscale.dist.comm import Comm
from tokscale.runs.submitted import frozen_commit

PACKAGES = (
    "tokscale",
    "torch",
    "deepspeed",
    "numpy",
    "einops",
    "pydantic",
    "hydra-core",
    "safetensors",
    "tokenizers",
    "transformers",
    "webdataset",
)
# An allow-list, since the environment holds keys and tokens, too.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "MASTER_ADDR", "TOKENIZERS_PARALLELISM", "WORLD_SIZE")
PREFIXES = ("GLOO_", "MKL_", "NCCL_", "OMP_", "SLURM_JOB_", "SLURM_N", "SLURM_RESTART_", "TORCH_")


def environment(comm: Comm) -> dict[str, Any]:
    """JSON-ready facts about this process's installation and machine."""
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "commit": _commit(Path(tokscale.__file__).parent),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "device": torch.cuda.get_device_name(comm.device) if comm.device.type == "cuda" else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "world": comm.world,
        "nodes": comm.env.nodes,
        "launcher": comm.env.launcher,
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name in VARIABLES or name.startswith(PREFIXES)
        },
    }


def git_diff() -> str:
    """How the running checkout's files differ from its commit, as a patch; empty when they do not, or outside one."""
    told = _git(Path(tokscale.__file__).parent, "diff", "HEAD")
    return told or ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The checkout's commit, with `+` when files differ from it; None outside a checkout."""
    if (frozen := frozen_commit(folder)) is not None:
        return frozen
    told = _git(folder, "describe", "--always", "--abbrev=40", "--dirty=+", "--match=")
    return (told or "").strip() or None


def _git(folder: Path, *words: str) -> str | None:
    try:
        told = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout if told.returncode == 0 else None
