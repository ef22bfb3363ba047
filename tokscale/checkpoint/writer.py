"""One rank's share of a checkpoint: a safetensors file per engine."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tokscale.base.errors import ConfigError
from tokscale.base.state import TensorShard
from tokscale.checkpoint.disk import Disk
from tokscale.checkpoint.manifest import FileRecord, Part, StoredTensor, part_key
from tokscale.checkpoint.tensorfile import Entry, dtype_code, host_chunks, write_tensors

_ENGINE_NAME = re.compile(r"[A-Za-z0-9_-]+")


def check_engine_name(name: str) -> None:
    """Engine names become file names.

    Raises:
        ConfigError: When a name has other characters than letters, digits, `_` and `-`.
    """
    if not _ENGINE_NAME.fullmatch(name):
        raise ConfigError(
            f"engine name {name!r}: use letters, digits, '_' and '-' only, since files are named after it"
        )


def write_share(
    disk: Disk, folder: Path, engine: str, rank: int, shards: Sequence[TensorShard], checkpoint_id: str
) -> tuple[dict[str, FileRecord], list[StoredTensor]]:
    """Write this rank's ranges of one engine durably.

    Args:
        disk: Through which every system call goes.
        folder: The temporary checkpoint folder.
        engine: The engine's name.
        rank: This rank.
        shards: The engine's `shards()`, or their copies in host memory.
        checkpoint_id: Goes into the file's header.

    Returns:
        The written file by name (none when this rank holds nothing), and what it contains.
    """
    name = f"{engine}.rank_{rank:05d}.safetensors"
    tensors, entries = [], []
    for shard in shards:
        stop = shard.start + shard.data.numel()
        # An empty tensor is stored in the index alone: it has no range.
        parts = [Part(name, shard.start, stop)] if stop > shard.start else []
        tensors.append(StoredTensor(shard.name, shard.slot, dtype_code(shard.data.dtype), tuple(shard.shape), parts))
        if parts:
            key = part_key(shard.name, shard.slot, shard.start)
            entries.append(Entry(key, shard.data.dtype, (shard.data.numel(),), partial(host_chunks, shard.data)))
    if not entries:
        return {}, tensors
    metadata = {"checkpoint": checkpoint_id, "engine": engine, "rank": str(rank)}
    written = write_tensors(disk, folder / name, entries, metadata)
    return {name: FileRecord(bytes=written.nbytes, sha256=written.sha256)}, tensors
