"""Runs `tokscale` as a job of the drill does: it stops in the middle of its stage until the drill lets it go on.

Where each stage is stopped is the function that does a piece of its work, after one piece was done if it has several.
Nothing else is changed. The drill's folder holds a file `slow` as long as it is to stop, gets a file `reached` when it
does, and says by a file `memory` that memory shall run out there, as CUDA says it.
"""

import importlib
import os
import sys
import time
from pathlib import Path

import torch

from tokscale.cli import main

PIECES = {
    "prepare": ("tokscale.data.raw.writer", "RawWriter._write_shard", 1),
    "train-tokenizer": ("tokscale.train.loop", "Trainer._begin", 4),
    "tokenize": ("tokscale.data.tokenization.work", "Worker._tokenize", 1),
    "tokenize-close": ("tokscale.stages.tokenize", "_check_units", 0),
    "embed": ("tokscale.data.tokenization.embed", "_embed_shard", 0),
    "train": ("tokscale.train.loop", "Trainer._begin", 4),
    "export": ("tokscale.stages.export", "export_checkpoint", 0),
    "sample": ("tokscale.inference.pretrained", "Pretrained.sample", 1),
    "evaluate": ("tokscale.inference.pretrained", "Pretrained.sample", 1),
}


def stop_at(folder: Path, module: str, name: str, after: int) -> None:
    owner = importlib.import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real, calls = getattr(owner, last), 0

    def stopped(*arguments, **keys):
        nonlocal calls
        calls += 1
        if calls > after and (folder / "slow").exists():
            (folder / "reached").touch()
            is_last = int(os.environ["SLURM_PROCID"]) == int(os.environ["SLURM_STEP_NUM_TASKS"]) - 1
            if (folder / "memory").exists() and is_last:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            while (folder / "slow").exists():
                time.sleep(0.1)
        return real(*arguments, **keys)

    setattr(owner, last, stopped)


if __name__ == "__main__":
    if os.environ["SLURM_JOB_NAME"] == f"tokscale-{os.environ['DRILL_STAGE']}":
        stop_at(Path(os.environ["DRILL"]), *PIECES[os.environ["DRILL_STAGE"]])
    sys.exit(main(sys.argv[sys.argv.index("tokscale") + 1 :]))
