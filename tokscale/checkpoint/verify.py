"""What makes a checkpoint folder trustworthy, check by check, from cheap to thorough."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokscale.base.errors import CheckpointError
from tokscale.base.files import read_regular, sha256_file
from tokscale.checkpoint.manifest import INDEX, STATE, Manifest
from tokscale.checkpoint.tensorfile import TensorFile


def check_sizes(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """These files of the manifest are there with their sizes.

    Raises:
        CheckpointError: With the first file that is not.
    """
    for name in names:
        path, record = folder / name, manifest.files[name]
        try:
            size = path.stat().st_size
        except OSError:
            raise CheckpointError(f"{path}: missing") from None
        if size != record.bytes:
            raise CheckpointError(f"{path}: {size} bytes, the manifest says {record.bytes}")


def check_belongs(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """The files' headers carry this save's id: no file was taken from another checkpoint.

    Raises:
        CheckpointError: With the first file that came from elsewhere or whose header is damaged.
    """
    for name in names:
        if not name.endswith(".safetensors"):
            read_small(folder, manifest, name)
            continue
        file = TensorFile(folder / name)
        file.close()
        if file.metadata.get("checkpoint") != manifest.id:
            raise CheckpointError(f"{folder / name}: belongs to another checkpoint")


def check_hashes(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """The files' bytes are those that were written. Reads all of them.

    Raises:
        CheckpointError: With the first damaged file.
    """
    for name in names:
        path = folder / name
        try:
            digest = sha256_file(path)
        except OSError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if digest != manifest.files[name].sha256:
            raise CheckpointError(f"{path}: damaged, its sha256 is not the manifest's")


def read_small(folder: Path, manifest: Manifest, name: str) -> bytes:
    """The index or the state, whose hash is always checked.

    Raises:
        CheckpointError: When it is missing or damaged.
    """
    assert name in (INDEX, STATE)
    path = folder / name
    try:
        data = read_regular(path, refuse=CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if name not in manifest.files or hashlib.sha256(data).hexdigest() != manifest.files[name].sha256:
        raise CheckpointError(f"{path}: damaged, its sha256 is not the manifest's")
    return data
