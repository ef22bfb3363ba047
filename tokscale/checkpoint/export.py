"""From a sharded checkpoint, or a state dict, to a folder of plain safetensors that loads anywhere.

Tensors are streamed in pieces, cast and hashed on the way, so memory does not grow with the model. No process group, no
GPU, no DeepSpeed.
"""

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokscale import __version__
from tokscale.base.config import fingerprint
from tokscale.base.errors import ConfigError
from tokscale.base.files import fsync_folder
from tokscale.base.formats import FORMAT
from tokscale.base.state import ShardSource
from tokscale.checkpoint.disk import Disk, refusals, remove_tree, write_file
from tokscale.checkpoint.outgoing import ExportTensor, Precision, from_source, from_state_dict
from tokscale.checkpoint.reader import Checkpoint
from tokscale.checkpoint.tensorfile import dtype_code, write_tensors
from tokscale.checkpoint.weights import (
    CONFIG,
    EXPORT_MANIFEST,
    WEIGHTS,
    WEIGHTS_INDEX,
    read_export_manifest,
    tied_names,
)

CARD = "README.md"
_OURS = re.compile(r"(config|manifest)\.json|model.*\.safetensors(\.index\.json)?|README\.md|(image|text)_.*")
"""What an export of an earlier version holds, that does not list its files."""


@dataclass(frozen=True)
class ExportOptions:
    """What of the weights is written, and what beside them."""

    dtype: Precision = "fp32"
    """Of floating-point parameters; buffers keep theirs. `stored`: as in the source."""
    weights: str = "raw"
    """`raw`, `ema/<decay>`, or `ema` for the only average there is."""
    max_shard_size: int = 5_000_000_000
    """Bytes of one safetensors file; when one is not enough, several get an index."""
    extras: Mapping[str, Path | str] = field(default_factory=dict)
    """Folders and files to copy in, by their name in the export: tokenizers."""
    card: str | None = None
    """Text of the README."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """JSON-ready facts for the manifest, that with the options identify the export; empty: always write anew."""


def export_checkpoint(
    checkpoint: Checkpoint,
    engine: str,
    *,
    meta_model: nn.Module,
    model_config: Mapping[str, Any],
    out: Path | str,
    dtype: Precision = "fp32",
    weights: str = "raw",
    max_shard_size: int = 5_000_000_000,
    extras: Mapping[str, Path | str] | None = None,
    card: str | None = None,
) -> Path:
    """Consolidate one engine of a checkpoint. When `out` already is this very export, nothing is written.

    Args:
        checkpoint: Of any layout.
        engine: Which of its engines.
        meta_model: The engine's model on the meta device: it says which tensors there must be.
        model_config: What `config.json` will hold; with its `kind`.
        out: The folder. An earlier export there is replaced, anything else is refused.
        dtype: See `ExportOptions`, as for the rest.
        weights: Raw weights or an average.
        max_shard_size: Bytes of one file.
        extras: Tokenizers and other things to copy in.
        card: Text of the README.

    Returns:
        `out`.

    Raises:
        CheckpointError: When names or shapes do not fit the model, or the checkpoint is damaged.
        ConfigError: When `out` holds something else, or `weights` was not saved.
        StorageError: When the file system refuses; `out` is then as it was.
    """
    manifest = checkpoint.manifest
    about = {"checkpoint": manifest.id, "run": manifest.run, "step": checkpoint.step, "engine": engine}
    options = ExportOptions(dtype, weights, max_shard_size, extras or {}, card, about)
    with checkpoint.source(engine) as source:
        return write_export(out, meta_model=meta_model, model_config=model_config, source=source, options=options)


def write_export(
    out: Path | str,
    *,
    meta_model: nn.Module,
    model_config: Mapping[str, Any],
    source: ShardSource | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    options: ExportOptions | None = None,
    disk: Disk | None = None,
) -> Path:
    """Write an export folder; it appears whole, under its name, or not at all.

    Args:
        out: The folder. An earlier export there is replaced, anything else is refused.
        meta_model: The model the weights are for, on the meta device: it says which tensors there must be.
        model_config: What `config.json` will hold; with its `kind`.
        source: A checkpoint's tensors; or
        state_dict: a model's own.
        options: What is written.
        disk: Through which every system call of writing goes.

    Raises:
        CheckpointError: When names or shapes do not fit the model, or the checkpoint is damaged.
        ConfigError: When `out` holds something else, or the averages asked for were not saved.
        StorageError: When the file system refuses; `out` is then as it was.
    """
    if (source is None) == (state_dict is None):
        raise TypeError("give either source or state_dict")
    out, disk, options = Path(out), disk or Disk(), options or ExportOptions()
    identity = _identity(model_config, options)
    existing = _existing(out)
    if options.about and existing is not None and existing["fingerprint"] == identity:
        return out
    place = _behind_links(out, replaces=existing is not None)
    if source is not None:
        tensors = from_source(source, meta_model, options.weights, options.dtype)
    else:
        tensors = from_state_dict(state_dict or {}, meta_model, options.dtype)
    with refusals(out, "nothing was exported"), _new_folder(disk, place) as folder:
        hashes = _write_weights(disk, folder, tensors, options.max_shard_size, tied_names(meta_model))
        _write_json(disk, folder / CONFIG, dict(model_config))
        for name, path in options.extras.items():
            _copy(Path(path), folder / name)
        if options.card is not None:
            write_file(disk, folder / CARD, options.card.encode())
        manifest = {
            "format": FORMAT,
            "tokscale": __version__,
            "created": time.time(),
            "fingerprint": identity,
            "about": dict(options.about),
            "weights": options.weights,
            "dtype": options.dtype,
            "tied": tied_names(meta_model),
            "files": sorted([*(path.name for path in folder.iterdir()), EXPORT_MANIFEST]),
            "tensors": {t.name: _record(t, hashes[t.name]) for t in tensors},
        }
        _write_json(disk, folder / EXPORT_MANIFEST, manifest)
    return out


def _record(tensor: ExportTensor, sha256: str) -> dict[str, Any]:
    return {"dtype": dtype_code(tensor.dtype), "shape": list(tensor.shape), "sha256": sha256}


def _behind_links(out: Path, *, replaces: bool) -> Path:
    """Where the folder really lies: a link may name a new one, but no export is replaced through it."""
    if not out.is_symlink():
        return out
    if replaces:
        raise ConfigError(
            f"{out}: is a link to {os.readlink(out)}, which holds another export; that one is not replaced through "
            "a link: remove the link, or give the folder itself as `out`"
        )
    return out.resolve()


def _identity(model_config: Mapping[str, Any], options: ExportOptions) -> str:
    values = [options.dtype, options.weights, options.max_shard_size, sorted(options.extras), options.card]
    return fingerprint([dict(options.about), dict(model_config), *values])


@contextmanager
def _new_folder(disk: Disk, out: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `out` when the block ends well, and goes otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear_up(disk, out)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        disk.make_folder(temporary)
        yield temporary
        disk.sync_folder(temporary)
        if out.exists():
            old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.replaced.tmp")
            disk.rename(out, old)
            disk.rename(temporary, out)
            _carry_over(disk, old, out)
            remove_tree(disk, old)
        else:
            disk.rename(temporary, out)
        disk.sync_folder(out.parent)
    except BaseException:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _clear_up(disk: Disk, out: Path) -> None:
    """Finish what a crashed export to the same place has begun: what it was about to replace is put back."""
    ours = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}(\.replaced)?\.tmp")
    for left in sorted(out.parent.iterdir()):
        found = ours.fullmatch(left.name)
        if found is None or left.is_symlink() or not left.is_dir():
            continue
        if found[1] and not out.exists():
            disk.rename(left, out)
            continue
        if found[1]:
            _carry_over(disk, left, out)
        remove_tree(disk, left)


def _carry_over(disk: Disk, old: Path, new: Path) -> None:
    """Keep what a person put into an export that is replaced."""
    made = (read_export_manifest(old) or {}).get("files")
    for entry in sorted(old.iterdir()):
        ours = entry.name in made if made is not None else _OURS.fullmatch(entry.name)
        if not ours and not os.path.lexists(new / entry.name):
            disk.rename(entry, new / entry.name)


def _write_weights(
    disk: Disk, folder: Path, tensors: Sequence[ExportTensor], max_shard_size: int, tied: Mapping[str, str]
) -> dict[str, str]:
    groups = _groups(tensors, max_shard_size)
    metadata = {"format": "pt", "tied": json.dumps(tied)}
    hashes: dict[str, str] = {}
    places: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = WEIGHTS if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        written = write_tensors(disk, folder / name, [t.entry for t in group], metadata, hash_each=True)
        hashes |= written.tensors
        places |= {t.name: name for t in group}
    if len(groups) > 1:
        total = sum(t.entry.nbytes for t in tensors)
        _write_json(disk, folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return hashes


def _groups(tensors: Sequence[ExportTensor], limit: int) -> list[list[ExportTensor]]:
    groups: list[list[ExportTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor.entry.nbytes
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    return groups


def _existing(out: Path) -> dict[str, Any] | None:
    """The manifest of the export that is already there.

    Raises:
        ConfigError: When something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    manifest = read_export_manifest(out) if out.is_dir() else None
    if manifest is None or "tensors" not in manifest:
        raise ConfigError(f"{out}: exists and is not an export of tokscale; choose another `out`, or move it away")
    return manifest


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
        for path in [target, *target.rglob("*")]:
            if path.is_dir():
                fsync_folder(path)
    else:
        shutil.copyfile(source, target)


def _write_json(disk: Disk, path: Path, value: Any) -> None:
    write_file(disk, path, (json.dumps(value, indent=2) + "\n").encode())
