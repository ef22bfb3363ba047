"""Whether a run folder holds anything of its run yet: one in which nothing was saved protects nothing.

A start may fail between claiming its folder and its first checkpoint: on a key that is found wrong late, for want of
memory, by a kill. What it leaves is no run, and must not keep the corrected command from the folder.
"""

import os
import shutil
import time
from pathlib import Path

from tokscale.base.files import new_folder
from tokscale.checkpoint.commit import checkpoint_folders
from tokscale.runs.arithmetic import ARITHMETIC_FILE
from tokscale.runs.restarts import STARTS_FILE
from tokscale.runs.segments import SEGMENTS_FILE, SET_ASIDE
from tokscale.train.ledger import LEDGER_FILE
from tokscale.train.metrics import METRICS_FILE

_MADE_OF_CHECKPOINTS = ("export", "sample", "evaluate")
"""Stages whose results speak for a run whose checkpoints are gone."""
_OF_ONE_RUN = (
    METRICS_FILE,
    LEDGER_FILE,
    STARTS_FILE,
    SEGMENTS_FILE,
    "init_from.json",
    "captions.json",
    "classes.json",
    "tensorboard",
    "wandb",
    "mlflow_run",
    "mlruns",
    "profile",
    "samples/training.jsonl",
    "samples/step_*.png",
    "checkpoints/best.json",
)
"""What training writes beside its checkpoints, as patterns."""
_UNSAVED = "-nothing-saved"


def holds_results(folder: Path, stage: str, run_dir: Path) -> bool:
    """Whether a stage has saved anything in its folder, or has ended well there. Reads only.

    Args:
        folder: The stage's own: `run_dir`, or one below it.
        stage: Which stage.
        run_dir: Where the ends of stages are kept.
    """
    root = folder / "checkpoints"
    if os.path.lexists(root) and not root.is_dir():
        return True  # a link to where nothing is mounted now, say
    if checkpoint_folders(root) or (root / SET_ASIDE).exists():
        return True
    further = _MADE_OF_CHECKPOINTS if folder == run_dir else ()
    return any((run_dir / "stages" / f"{name}.json").exists() for name in (stage, *further))


def forget_arithmetic(folder: Path) -> None:
    """Leave the choice of the arithmetic to the next start."""
    (folder / ARITHMETIC_FILE).unlink(missing_ok=True)


def set_unsaved_aside(folder: Path) -> Path | None:
    """Move what a start that saved nothing has written into `set_aside/`, so that it does not mix with another run's.

    Returns:
        Where it is now; None when there was nothing.
    """
    found = [path for pattern in _OF_ONE_RUN for path in sorted(folder.glob(pattern))]
    if not found:
        return None
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    target = new_folder(folder / SET_ASIDE / f"{stamp}{_UNSAVED}")
    for path in found:
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, place)
    return target


def unsaved(folder: Path) -> list[Path]:
    """Where the files of earlier starts are that saved nothing, oldest first."""
    return sorted((folder / SET_ASIDE).glob(f"*{_UNSAVED}*"))
