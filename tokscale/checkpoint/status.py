"""What stands in a checkpoints folder, for a person."""

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokscale.base.errors import CheckpointError
from tokscale.checkpoint.commit import checkpoint_folders, step_of
from tokscale.checkpoint.manifest import Manifest, read_checkpoint_manifest
from tokscale.checkpoint.verify import check_belongs, check_hashes, check_sizes


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint folder as it lies there."""

    folder: Path
    step: int
    complete: bool
    """A valid manifest, and every file with its size and this save's mark."""
    bytes: int
    """On disk, whatever the state."""
    world: int | None = None
    """Ranks that wrote it; None when the manifest cannot be read, as for the next two."""
    engines: tuple[str, ...] = ()
    age_seconds: float | None = None
    hashes_hold: bool | None = None
    """None when they were not looked at."""
    problem: str = ""
    """Why it cannot be used."""


def describe(root: Path | str, *, verify: Literal["sizes", "full"] = "sizes") -> list[CheckpointInfo]:
    """Look at every checkpoint of a run, oldest first, and change nothing.

    Args:
        root: The run's `checkpoints` folder; a missing one has no checkpoints.
        verify: `full` reads every byte.
    """
    return [_look(folder, verify == "full") for folder in checkpoint_folders(Path(root))]


def newest_step(root: Path | str) -> int:
    """The step of the newest finished checkpoint; 0 when there is none.

    Reads one manifest, and further ones only past folders without a valid one: a manifest is written last, so what has
    one was finished. Whether its files are still whole is looked at by whoever loads it.
    """
    for folder in reversed(checkpoint_folders(Path(root))):
        with suppress(CheckpointError):
            manifest = read_checkpoint_manifest(folder)
            if manifest.step == step_of(folder):
                return manifest.step
    return 0


def table(infos: Iterable[CheckpointInfo]) -> str:
    """The same as aligned text with a header line."""
    rows = [("step", "complete", "size", "ranks", "engines", "age", "hashes", "problem")]
    for info in infos:
        hashes = {None: "not checked", True: "hold", False: "BROKEN"}[info.hashes_hold]
        rows.append(
            (
                str(info.step),
                "yes" if info.complete else "NO",
                _size(info.bytes),
                "?" if info.world is None else str(info.world),
                ",".join(info.engines) or "?",
                "?" if info.age_seconds is None else _age(info.age_seconds),
                hashes,
                info.problem,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _look(folder: Path, full: bool) -> CheckpointInfo:
    step = step_of(folder) or 0
    size = _bytes_in(folder)
    manifest: Manifest | None = None
    try:
        manifest = read_checkpoint_manifest(folder)
        check_sizes(folder, manifest, manifest.files)
        check_belongs(folder, manifest, manifest.files)
        if manifest.step != step:
            raise CheckpointError(f"{folder}: holds step {manifest.step}; it was renamed")
    except CheckpointError as error:
        return _info(folder, step, size, manifest, complete=False, problem=str(error))
    if not full:
        return _info(folder, step, size, manifest, complete=True)
    try:
        check_hashes(folder, manifest, manifest.files)
    except CheckpointError as error:
        return _info(folder, step, size, manifest, complete=True, hashes_hold=False, problem=str(error))
    return _info(folder, step, size, manifest, complete=True, hashes_hold=True)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        with suppress(OSError):  # a run may be pruning it right now
            total += path.stat().st_size
    return total


def _info(
    folder: Path,
    step: int,
    size: int,
    manifest: Manifest | None,
    *,
    complete: bool,
    hashes_hold: bool | None = None,
    problem: str = "",
) -> CheckpointInfo:
    return CheckpointInfo(
        folder=folder,
        step=step,
        complete=complete,
        bytes=size,
        world=None if manifest is None else manifest.world,
        engines=() if manifest is None else tuple(manifest.engines),
        age_seconds=None if manifest is None else max(time.time() - manifest.created, 0.0),
        hashes_hold=hashes_hold,
        problem=problem,
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
