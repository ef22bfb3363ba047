"""The segments of a run: from which step on it was trained with which keys.

A run is one configuration from its first step to its last, and its folder is refused to any other. Some keys may be
changed in the middle all the same, when a person asks for it on the record (`on_change=record`): the data order goes on
exactly, and the folder keeps what was changed from which step on. `resume_from=STEP` goes back first; what was saved
after that step is set aside, never deleted.
"""

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from tokscale.base.errors import CheckpointError, DataError
from tokscale.base.files import fsync_folder, new_folder, read_json, write_json
from tokscale.base.log import logger
from tokscale.checkpoint.commit import checkpoint_folders, step_of
from tokscale.checkpoint.reader import Checkpoint
from tokscale.engine.config import ScheduleConfig
from tokscale.engine.schedule import Schedule
from tokscale.runs.stage import StageConfig
from tokscale.train.metrics import METRICS_FILE

SEGMENTS_FILE, SET_ASIDE = "segments.json", "set_aside"
_RECORDABLE = ("optim", "discriminator_optim", "schedule", "batch_size")
_RECORDABLE_KEYS = ("engine.gradient_clipping",)
_KINDS = ("optim.kind", "discriminator_optim.kind")
"""Another optimizer has other moments; that is another run."""
_SAME = 1e-6
log = logger("runs")

Change = tuple[Any, Any]


class ResumableConfig(StageConfig):
    """Keys of every stage that goes on from its own checkpoints."""

    deterministic: bool = False
    """On CUDA: deterministic algorithms and no TF32, so that a resumed run is equal to the last bit, as it always is on
    a CPU. Without it, it differs from the undisturbed run no more than two undisturbed ones do. Slower; an operation
    that has no deterministic algorithm is an error that names it."""
    on_change: Literal["refuse", "record"] = "refuse"
    """What to do when keys that make the run differ from those that the run folder was made with: refuse, or go on with
    the new ones and record it in `segments.json`. Possible for the optimizer's and the schedule's options, `batch_size`
    and `engine.gradient_clipping`; also needed to extend a finished run when that moves the learning rate."""
    resume_from: int | None = Field(default=None, ge=1)
    """Go back to the checkpoint of this step; later ones are moved to `checkpoints/set_aside`. Done once: the same
    command, started again, goes on from the newest checkpoint that was made since."""


def is_recordable(key: str) -> bool:
    """Whether a key may be changed in the middle of a run, on the record."""
    first = key.partition(".")[0]
    return key in _RECORDABLE_KEYS or (first in _RECORDABLE and key not in _KINDS)


def extension(there: Mapping[str, Any], here: Mapping[str, Any], newest: int) -> dict[str, Change]:
    """What extending a finished run changes: its length and, at the step where it goes on, the learning rate.

    Args:
        there: The stage's configuration as the folder has it, JSON-ready.
        here: As it is asked for.
        newest: The last step that is saved.

    Returns:
        Old and new values by key; empty when the run was not finished or the learning rate stays as it was.
    """
    try:
        total, longer = there["loop"]["total_steps"], here["loop"]["total_steps"]
        if newest < total or longer <= total:
            return {}
        old = there["optim"]["lr"] * _schedule(there, total)(total - 1)
        new = here["optim"]["lr"] * _schedule(here, longer)(newest)
    except (KeyError, TypeError, ValidationError):
        return {}  # a stage without them, or a description of an earlier version
    if abs(new - old) <= _SAME * max(abs(old), abs(new)):
        return {}
    return {"loop.total_steps": (total, longer), f"learning rate at step {newest}": (old, new)}


def read_segments(folder: Path) -> list[dict[str, Any]]:
    """The segments of a run, oldest first: `from_step`, `changes` (old and new by key), `resume_from`, `set_aside`.

    Raises:
        DataError: When the file is damaged.
    """
    path = folder / SEGMENTS_FILE
    if not path.exists():
        return []
    segments = read_json(path).get("segments")
    if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
        raise DataError(f"{path}: holds no list of segments; restore it, or move it away")
    return segments


def cut_is_due(folder: Path, config: StageConfig) -> bool:
    """Whether `resume_from` asks for something that was not done yet, as far as the folder's record says."""
    if not isinstance(config, ResumableConfig) or config.resume_from is None:
        return False
    segments = read_segments(folder)
    return not (segments and segments[-1]["resume_from"] == config.resume_from)


def record(folder: Path, config: StageConfig, changes: Mapping[str, Change]) -> None:
    """Go back if that is asked for, and note what changes from here on. By the main rank, which holds the lock.

    Raises:
        CheckpointError: When the step to go back to is not saved, or its checkpoint is not whole.
    """
    back = config.resume_from if isinstance(config, ResumableConfig) else None
    if back is not None and not changes and not cut_is_due(folder, config):
        log.info("resume_from=%d was done before; going on from the newest checkpoint", back)
        return
    if back is None and not changes:
        return
    root = folder / "checkpoints"
    aside = _set_aside(folder, root, back) if back is not None else None
    saved = [step for path in checkpoint_folders(root) if (step := step_of(path)) is not None]
    segment = {
        "from_step": back if back is not None else max(saved, default=0),
        "time": round(time.time(), 3),
        "changes": {key: list(change) for key, change in changes.items()},
        "resume_from": back,
        "set_aside": aside,
    }
    write_json(folder / SEGMENTS_FILE, {"segments": [*read_segments(folder), segment]})
    log.warning("%s: %s", folder, describe(segment))


def describe(segment: Mapping[str, Any]) -> str:
    """One segment for a person."""
    changes = [f"{key} {_shown(old)} -> {_shown(new)}" for key, (old, new) in segment["changes"].items()]
    words = ", ".join(changes) or "nothing changed"
    aside = f"; later checkpoints are in {segment['set_aside']}" if segment["set_aside"] else ""
    return f"from step {segment['from_step']} on: {words}{aside}"


def _set_aside(folder: Path, root: Path, step: int) -> str | None:
    """Move the checkpoints after a step away; where to, or None when there are none."""
    there = {step_of(path): path for path in checkpoint_folders(root)}
    if step not in there:
        known = ", ".join(str(saved) for saved in there) or "none"
        raise CheckpointError(f"{root}: resume_from={step}: no such checkpoint; there are steps {known}")
    Checkpoint(there[step])  # whole, before anything is moved
    later = [path for saved, path in there.items() if saved is not None and saved > step]
    if not later:
        return None
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    target = new_folder(root / SET_ASIDE / f"{stamp}-after-step-{step}")
    if (folder / METRICS_FILE).exists():  # its lines about later steps are about to be dropped
        shutil.copyfile(folder / METRICS_FILE, target / METRICS_FILE)
    for path in sorted(later, reverse=True):  # a kill in between leaves a run that goes on further back, and no gap
        os.rename(path, target / path.name)
    fsync_folder(target)
    fsync_folder(root)
    return str(target.relative_to(folder))


def _schedule(values: Mapping[str, Any], total: int) -> Schedule:
    return Schedule(ScheduleConfig.model_validate(values["schedule"]), total)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
