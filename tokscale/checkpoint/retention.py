"""Which checkpoints go when a newer one is there."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tokscale.base.errors import CheckpointError, DataError
from tokscale.base.files import read_json, write_json
from tokscale.base.log import logger
from tokscale.checkpoint.commit import checkpoint_folders
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.disk import Disk, remove_tree
from tokscale.checkpoint.manifest import read_checkpoint_manifest
from tokscale.checkpoint.verify import check_sizes

_log = logger("checkpoint")


BEST = "best.json"
"""In a folder of checkpoints: the steps that were the best so far by a metric, the newest last."""


def write_best(root: Path, step: int, metric: str, value: float | None) -> None:
    """Note that a step, about to be saved, is the best so far; those before it stay noted until it is there."""
    root.mkdir(parents=True, exist_ok=True)
    earlier = [entry for entry in _bests(root) if entry["step"] < step]
    write_json(root / BEST, {"metric": metric, "best": [*earlier[-8:], {"step": step, "value": value}]})


def best_step(root: Path, complete: Collection[int]) -> int | None:
    """The best of the steps that are there; None where none was noted."""
    return next((entry["step"] for entry in reversed(_bests(root)) if entry["step"] in complete), None)


def _bests(root: Path) -> list[dict[str, Any]]:
    try:
        found = read_json(root / BEST)["best"]
        return [entry for entry in found if isinstance(entry["step"], int)]
    except (DataError, KeyError, TypeError):
        return []  # not there, or damaged: nothing is kept beyond the usual


def steps_to_delete(steps: Sequence[int], keep_last: int, keep_every: int) -> list[int]:
    """Which of the complete checkpoints' steps, in ascending order, may be deleted. Two always stay."""
    candidates = steps[: -max(keep_last, 2)]
    return [step for step in candidates if not (keep_every and step % keep_every == 0)]


def prune(disk: Disk, root: Path, config: CheckpointConfig, rejected: Collection[int] = ()) -> None:
    """Delete what retention does not keep. Call after a commit, on rank 0.

    Damaged ones, those with values that are not finite, and links to a place elsewhere neither count nor go: so the
    newest sound one always stays. A failure is a warning: the new checkpoint is safe, and the next save tries again.

    Args:
        disk: Through which every system call goes.
        root: The folder of checkpoints.
        config: How much to keep.
        rejected: Steps whose checkpoints were found not to be loadable.
    """
    complete = {}
    for folder in checkpoint_folders(root):
        if folder.is_symlink():
            continue
        try:
            manifest = read_checkpoint_manifest(folder)
            check_sizes(folder, manifest, manifest.files)
        except CheckpointError:
            continue  # damaged ones neither count nor go: a person may want to look at them
        if manifest.sound is not False and manifest.step not in rejected:
            complete[manifest.step] = folder
    best = best_step(root, complete)
    for step in steps_to_delete(sorted(complete), config.keep_last, config.keep_every):
        if step == best:
            continue
        folder = complete[step]
        # Out of sight in one step first, so that a half-deleted checkpoint never has a checkpoint's name.
        doomed = root / f".{folder.name}.deleted.tmp"
        try:
            disk.rename(folder, doomed)
            remove_tree(disk, doomed)
        except OSError as error:
            _log.warning("%s: retention could not delete it: %s", folder, error)
