"""A container runtime whose image holds no program of Slurm and no slurm.conf, as images do.

The same root file system, but with every program except Slurm's on the path, and with the variables that images of NGC
set in each task as if torchrun had started it. Understands what `slurm/lib/container.sh` says to apptainer.
"""

import os
import stat
import sys
from pathlib import Path

_SLURM = ("sacct", "sacctmgr", "salloc", "sattach", "sbatch", "sbcast", "scancel", "scontrol", "sdiag", "sinfo")
_SLURM += ("sprio", "squeue", "srun", "sstat", "munge", "unmunge", "remunge")
_SCRIPT = """#!/usr/bin/env bash
set -euo pipefail
[[ $1 == exec ]] && shift
while [[ $1 == --* ]]; do
    case $1 in
        --pwd) cd "$2" && shift 2 ;;
        --bind) shift 2 ;;
        *) shift ;;
    esac
done
[[ -e $1 ]] || { echo "FATAL: could not open image $1: no such file" >&2 && exit 255; }
image=$1
shift
unset SLURM_CONF
export RANK=${SLURM_PROCID:-0} WORLD_SIZE=${SLURM_NTASKS:-1} LOCAL_RANK=0 LOCAL_WORLD_SIZE=16 PATH=$image
exec "$@"
"""


def install(folder: Path) -> tuple[Path, Path]:
    """Write the runtime and an image.

    Returns:
        The folder for the PATH of the batch script, and the image.
    """
    tools, image = folder / "tools", folder / "image.sif"
    tools.mkdir()
    image.mkdir()
    runtime = tools / "apptainer"
    runtime.write_text(_SCRIPT)
    runtime.chmod(runtime.stat().st_mode | stat.S_IXUSR)
    for program in Path("/usr/bin").iterdir():
        if program.name not in _SLURM:
            (image / program.name).symlink_to(program)
    assert not (image / "scontrol").exists() and os.access(sys.executable, os.X_OK)
    return tools, image
