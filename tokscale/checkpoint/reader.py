"""A finished checkpoint, read by byte ranges."""

import bisect
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokscale.base.config import did_you_mean
from tokscale.base.errors import CheckpointError
from tokscale.base.formats import Stored, upgrade
from tokscale.checkpoint.manifest import (
    INDEX,
    STATE,
    Manifest,
    StoredTensor,
    parse_index,
    part_key,
    read_checkpoint_manifest,
)
from tokscale.checkpoint.tensorfile import TensorFile, dtype_of
from tokscale.checkpoint.verify import check_sizes, read_small

_OPEN_FILES = 64


class Checkpoint:
    """A complete checkpoint folder.

    Attributes:
        folder: Where it lies.
        manifest: What it contains.
    """

    def __init__(self, folder: Path | str, manifest: Manifest | None = None, small: Mapping[str, bytes] | None = None):
        """Open a folder.

        Args:
            folder: Where it lies.
            manifest: What another rank has read there and checked, see `verify`; by default it is read, and the sizes
                of the files are checked, now.
            small: Likewise, its index and its state.

        Raises:
            CheckpointError: When the folder is not a complete checkpoint.
        """
        self.folder, self._small = Path(folder), dict(small or {})
        self.manifest: Manifest = manifest or read_checkpoint_manifest(self.folder)
        if manifest is None:
            check_sizes(self.folder, self.manifest, self.manifest.files)

    @property
    def step(self) -> int:
        """Optimizer updates done when it was saved."""
        return self.manifest.step

    @property
    def engines(self) -> tuple[str, ...]:
        """Names of the engines that were saved."""
        return tuple(self.manifest.engines)

    @cached_property
    def state(self) -> dict[str, Any]:
        """What the saver passed as `state`, its configurations in today's words."""
        state = json.loads(self._read_small(STATE))
        kinds: dict[str, Stored] = {"models": "model", "config": "run", "loader": "loader"}
        for key, kind in kinds.items():
            if key in state:
                state[key] = upgrade(kind, state[key], self.manifest.format)
        return state

    def source(self, engine: str) -> "CheckpointSource":
        """One engine's tensors.

        Raises:
            CheckpointError: When no engine of that name was saved.
        """
        if engine not in self._index:
            raise CheckpointError(f"{self.folder}: no engine {engine!r}{did_you_mean(engine, self._index)}")
        return CheckpointSource(self.folder, self.manifest, engine, self._index[engine])

    @cached_property
    def _index(self) -> dict[str, list[StoredTensor]]:
        return parse_index(self._read_small(INDEX))

    def _read_small(self, name: str) -> bytes:
        return self._small[name] if name in self._small else read_small(self.folder, self.manifest, name)


class CheckpointSource:
    """One engine's tensors in a checkpoint: the `ShardSource` that engines load from.

    Attributes:
        bytes_read: Data bytes read so far, for tests and progress.
    """

    def __init__(self, folder: Path, manifest: Manifest, engine: str, tensors: list[StoredTensor]):
        self.engine = engine
        self.scalars: Mapping[str, Any] = manifest.engines[engine].scalars
        self.bytes_read = 0
        self._folder, self._id = folder, manifest.id
        self._tensors = {(tensor.name, tensor.slot): tensor for tensor in tensors}
        self._slots: dict[str, list[str]] = {}
        for tensor in tensors:
            self._slots.setdefault(tensor.name, []).append(tensor.slot)
        self._open: dict[str, TensorFile] = {}

    def names(self) -> tuple[str, ...]:
        """All stored tensor names, in saving order."""
        return tuple(self._slots)

    def slots(self, name: str) -> tuple[str, ...]:
        """Which slots are stored for a tensor; empty when the name is unknown."""
        return tuple(self._slots.get(name, ()))

    def shape(self, name: str, slot: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._find(name, slot).shape

    def dtype(self, name: str, slot: str) -> torch.dtype:
        """The dtype it is stored in."""
        return dtype_of(self._find(name, slot).dtype)

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)`, one-dimensional, on the CPU; reads only these bytes.

        Raises:
            CheckpointError: When the tensor is not stored, the range lies outside it, or its file is damaged.
        """
        stored = self._find(name, slot)
        if not 0 <= start <= stop <= stored.numel:
            raise CheckpointError(f"{name!r} ({slot}): [{start}, {stop}) lies outside its {stored.numel} elements")
        out = torch.empty(stop - start, dtype=dtype_of(stored.dtype))
        first = bisect.bisect_right(stored.parts, start, key=lambda part: part.stop)
        for part in stored.parts[first:]:
            if part.start >= stop:
                break
            low, high = max(start, part.start), min(stop, part.stop)
            file = self._file(part.file)
            file.read(part_key(name, slot, part.start), low - part.start, out[low - start : high - start])
            self.bytes_read += (high - low) * out.dtype.itemsize
        return out

    def close(self) -> None:
        """Close the open files; a later read opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> "CheckpointSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, name: str, slot: str) -> StoredTensor:
        stored = self._tensors.get((name, slot))
        if stored is None:
            known = self._slots.get(name)
            detail = did_you_mean(name, self._slots) if known is None else f"; stored are {', '.join(known)}"
            raise CheckpointError(f"{self._folder}: engine {self.engine!r} has no {slot!r} of {name!r}{detail}")
        return stored

    def _file(self, name: str) -> TensorFile:
        file = self._open.pop(name, None)
        if file is None:
            file = TensorFile(self._folder / name)
            if file.metadata.get("checkpoint") != self._id:
                file.close()
                raise CheckpointError(f"{self._folder / name}: belongs to another checkpoint")
            if len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
        self._open[name] = file  # the most recently used last
        return file
