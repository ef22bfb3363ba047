"""From a temporary folder to a checkpoint: the steps whose order makes a crash harmless.

    .step_000001000.<id>.tmp/   every rank writes and fsyncs its files
                                rank 0 writes index.json, state.json, and last manifest.json
    step_000001000/             one rename; the parent folder is fsynced
    latest                      a hint for people; nothing reads it to decide

A crash before the rename leaves a temporary folder that the next save sweeps away; after it the checkpoint is whole.
"""

import hashlib
import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokscale import __version__
from tokscale.base.errors import CheckpointError, DataError, StorageError
from tokscale.base.files import read_json
from tokscale.base.formats import FORMAT
from tokscale.base.log import logger
from tokscale.checkpoint.disk import Disk, remove_tree, write_file
from tokscale.checkpoint.manifest import (
    INDEX,
    MANIFEST,
    STATE,
    EngineRecord,
    FileRecord,
    Manifest,
    StoredTensor,
    index_bytes,
    manifest_bytes,
    merge_ranks,
    read_checkpoint_manifest,
)
from tokscale.checkpoint.tensorfile import dtype_of

LATEST, RUN = "latest", "run.json"
_NAME = re.compile(r"step_(\d{9,})")
_LEFTOVER = re.compile(r"\.(step_\d{9,}|latest|run\.json)\..*\.tmp")
_VISIBLE_SECONDS = 120.0
"""How long a network file system may take to show another node's new file."""
_log = logger("checkpoint")

Share = dict[str, tuple[dict[str, FileRecord], list[StoredTensor]]]
"""What one rank wrote, by engine name."""


def folder_name(step: int) -> str:
    """`step_000001000`."""
    return f"step_{step:09d}"


def step_of(folder: Path) -> int | None:
    """The step a folder's name stands for; None for any other name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoint_folders(root: Path) -> list[Path]:
    """All folders with a checkpoint's name, oldest first, complete or not."""
    if not root.is_dir():
        return []
    found = [(step, entry) for entry in root.iterdir() if (step := step_of(entry)) is not None]
    return [entry for _, entry in sorted(found)]


@dataclass(frozen=True)
class Pending:
    """A save under way; equal on all ranks."""

    root: Path
    step: int
    id: str
    run: str
    state: bytes
    """JSON."""
    scalars: dict[str, dict[str, Any]]
    """By engine name."""

    @property
    def temporary(self) -> Path:
        """Where files are written."""
        return self.root / f".{folder_name(self.step)}.{self.id}.tmp"

    @property
    def final(self) -> Path:
        """Where the checkpoint will be."""
        return self.root / folder_name(self.step)


def sweep(disk: Disk, root: Path) -> None:
    """Delete what crashed saves and interrupted deletions left behind."""
    for entry in sorted(root.iterdir()):
        if _LEFTOVER.fullmatch(entry.name):
            _log.info("removing %s, left by an interrupted save", entry)
            real = entry.is_dir() and not entry.is_symlink()
            remove_tree(disk, entry) if real else disk.remove_file(entry)


def run_id(disk: Disk, root: Path) -> str:
    """The identity of this run's checkpoints, kept in `run.json` beside them, which is made when it is missing.

    A folder that lost its `run.json` takes over the run of its newest readable checkpoint.
    """
    stored = read_run_id(root)
    if stored is not None:
        return stored
    run = _newest_run(root) or secrets.token_hex(8)
    temporary = root / f".{RUN}.{secrets.token_hex(4)}.tmp"
    write_file(disk, temporary, json.dumps({"run": run}).encode())
    disk.replace(temporary, root / RUN)
    disk.sync_folder(root)
    return run


def _newest_run(root: Path) -> str | None:
    for folder in reversed(checkpoint_folders(root)):
        try:
            return read_checkpoint_manifest(folder).run
        except CheckpointError:
            continue
    return None


def read_run_id(root: Path) -> str | None:
    """What `run.json` says; None when it is missing or damaged."""
    try:
        run = read_json(root / RUN)["run"]
    except (OSError, DataError, ValueError, KeyError, TypeError):
        return None
    return run if isinstance(run, str) else None


def finish(disk: Disk, pending: Pending, shares: Sequence[Share]) -> None:
    """Turn the ranks' finished files into a checkpoint. Rank 0 only, after every rank's `write_share`."""
    files = {name: record for share in shares for written, _ in share.values() for name, record in written.items()}
    engines = {name: merge_ranks(name, [share[name][1] for share in shares]) for name in pending.scalars}
    folder = pending.temporary
    _wait_until_visible(folder, files)
    for name, data in ((INDEX, index_bytes(engines)), (STATE, pending.state)):
        write_file(disk, folder / name, data)
        files[name] = FileRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    disk.sync_folder(folder)
    write_file(disk, folder / MANIFEST, manifest_bytes(_manifest(pending, files, engines, world=len(shares))))
    disk.sync_folder(folder)
    if pending.final.exists():
        # The caller found it damaged; kept aside for a person to look at.
        disk.rename(pending.final, pending.final.with_name(f"{pending.final.name}.damaged-{pending.id}"))
    disk.rename(folder, pending.final)
    disk.sync_folder(pending.root)


def point_latest(disk: Disk, pending: Pending) -> None:
    """Name the newest checkpoint in `latest`, for people. Failing to is not a failure of the save."""
    temporary = pending.root / f".{LATEST}.{pending.id}.tmp"
    try:
        write_file(disk, temporary, f"{pending.final.name}\n".encode())
        disk.replace(temporary, pending.root / LATEST)
    except OSError as error:
        _log.warning("%s was saved, but %s could not be updated: %s", pending.final, pending.root / LATEST, error)


def discard(disk: Disk, folder: Path) -> None:
    """Delete the temporary folder of a failed save, as far as the storage allows; the next save sweeps the rest."""
    try:
        if folder.exists():
            remove_tree(disk, folder)
    except OSError as error:
        _log.warning("%s: could not be removed (%s); it is ignored and the next save removes it", folder, error)


def _manifest(
    pending: Pending, files: dict[str, FileRecord], engines: dict[str, list[StoredTensor]], world: int
) -> Manifest:
    records = {
        name: EngineRecord(
            scalars=pending.scalars[name],
            tensors=len(tensors),
            bytes=sum(tensor.numel * dtype_of(tensor.dtype).itemsize for tensor in tensors),
        )
        for name, tensors in engines.items()
    }
    return Manifest(
        format=FORMAT,
        id=pending.id,
        run=pending.run,
        step=pending.step,
        created=time.time(),
        world=world,
        versions={"tokscale": __version__, "torch": torch.__version__},
        files=files,
        engines=records,
        sound=True,
    )


def _wait_until_visible(folder: Path, files: dict[str, FileRecord]) -> None:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    for name, record in files.items():
        path = folder / name
        while not path.exists() or path.stat().st_size != record.bytes:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{path}: another rank wrote it, but rank 0 does not see it; "
                    "checkpoints need a folder that all nodes share"
                )
            time.sleep(0.1)
