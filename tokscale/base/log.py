"""Logging that a person can read in a terminal and grep in a Slurm log."""

import logging
import sys
from pathlib import Path

FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def logger(name: str) -> logging.Logger:
    """The logger of a part, e.g. `logger("train")`; all hang below `tokscale`."""
    return logging.getLogger(f"tokscale.{name}")


def configure(rank: int = 0, folder: Path | None = None, level: int = logging.INFO) -> None:
    """Send rank 0's messages to standard error, and every rank's to `folder/rank_0000.log` when a folder is given.

    Other ranks speak on standard error only from warnings upwards, with their rank, so that one failure is not lost
    and a thousand equal lines are not printed.
    """
    root = logging.getLogger("tokscale")
    root.setLevel(level)
    root.propagate = False
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    stream = logging.StreamHandler(sys.stderr)
    stream.setLevel(level if rank == 0 else logging.WARNING)
    stream.setFormatter(logging.Formatter(prefix + FORMAT, datefmt="%H:%M:%S"))
    root.addHandler(stream)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / f"rank_{rank:04d}.log")
        file.setFormatter(logging.Formatter(FORMAT))
        root.addHandler(file)
