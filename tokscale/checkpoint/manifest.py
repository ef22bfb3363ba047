"""What a checkpoint says about itself: the manifest that makes it complete, and the index of where each range lies."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt, ValidationError

from tokscale.base.config import Config, StoredName, decode
from tokscale.base.errors import CheckpointError
from tokscale.base.files import parse_json, read_regular
from tokscale.base.formats import FORMAT

READABLE = (1, FORMAT)
_Count = NonNegativeInt
_Sides = tuple[NonNegativeInt, ...]
MANIFEST, INDEX, STATE = "manifest.json", "index.json", "state.json"


class FileRecord(Config):
    """One file of the checkpoint."""

    bytes: NonNegativeInt
    sha256: str


class EngineRecord(Config):
    """One named engine's share of the checkpoint."""

    scalars: dict[str, Any]
    """The engine's `scalars()`."""
    tensors: NonNegativeInt
    """How many `(name, slot)` pairs are stored."""
    bytes: NonNegativeInt


class Manifest(Config):
    """Written last. A folder with a valid manifest is a complete checkpoint, and nothing else is."""

    format: int
    id: str
    """Of this save; every tensor file carries it too, so that files of two saves cannot be mixed."""
    run: str
    """Of the run folder, so that checkpoints of two runs cannot be mixed."""
    step: NonNegativeInt
    created: float
    """Seconds since the epoch."""
    world: PositiveInt
    """Ranks that wrote it."""
    versions: dict[str, str]
    files: dict[StoredName, FileRecord]
    engines: dict[str, EngineRecord]
    sound: bool | None = None
    """All weights, moments and averages were finite when it was saved; null in those of versions that did not look."""


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as stored: its content and the content's own sha256, so that a flipped bit in it shows."""
    content = manifest.model_dump(mode="json")
    return json.dumps({"content": content, "sha256": _digest(content)}, indent=1).encode()


def read_checkpoint_manifest(folder: Path) -> Manifest:
    """Read and check a checkpoint's manifest.

    Raises:
        CheckpointError: When it is missing, damaged, or of a format that this version does not know.
    """
    path = folder / MANIFEST
    try:
        if not path.exists():
            raise FileNotFoundError
        stored = parse_json(read_regular(path, refuse=CheckpointError))
        content, digest = stored["content"], stored["sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, so the checkpoint was never finished") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    if _digest(content) != digest:
        raise CheckpointError(f"{path}: damaged (its own checksum does not hold)")
    if content.get("format") not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise CheckpointError(f"{path}: format {content.get('format')!r}; this version of tokscale reads {known}")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Part:
    """Elements `[start, stop)` of a tensor, in one file."""

    file: str
    start: int
    stop: int


@dataclass
class StoredTensor:
    """One `(name, slot)` and where its ranges lie."""

    name: str
    slot: str
    dtype: str
    """safetensors name."""
    shape: tuple[int, ...]
    parts: list[Part] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.shape)


def part_key(name: str, slot: str, start: int) -> str:
    """Under which key a range lies in its file."""
    return f"{slot}|{name}@{start}"


def merge_ranks(engine: str, ranks: Iterable[Iterable[StoredTensor]]) -> list[StoredTensor]:
    """Join what every rank stored, and check that the ranges tile every tensor exactly once.

    Raises:
        CheckpointError: When ranks contradict each other or a range is missing or stored twice: the engine is wrong.
    """
    merged: dict[tuple[str, str], StoredTensor] = {}
    for tensors in ranks:
        for tensor in tensors:
            known = merged.setdefault(
                (tensor.name, tensor.slot), StoredTensor(tensor.name, tensor.slot, tensor.dtype, tensor.shape)
            )
            if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
                raise CheckpointError(
                    f"engine {engine!r}, {tensor.name!r} ({tensor.slot}): ranks hold {known.dtype}{known.shape} and "
                    f"{tensor.dtype}{tensor.shape}"
                )
            known.parts += tensor.parts
    for tensor in merged.values():
        tensor.parts.sort(key=lambda part: part.start)
        _check_tiling(engine, tensor)
    return list(merged.values())


def _check_tiling(engine: str, tensor: StoredTensor) -> None:
    at = 0
    for part in tensor.parts:
        if part.start != at:
            kind = "nobody stored" if part.start > at else "two ranks stored"
            low, high = sorted((at, part.start))
            raise CheckpointError(
                f"engine {engine!r}, {tensor.name!r} ({tensor.slot}): {kind} elements [{low}, {high}) of {tensor.numel}"
            )
        at = part.stop
    if at != tensor.numel:
        raise CheckpointError(
            f"engine {engine!r}, {tensor.name!r} ({tensor.slot}): nobody stored elements [{at}, {tensor.numel})"
        )


def index_bytes(engines: Mapping[str, list[StoredTensor]]) -> bytes:
    """The index of all engines as JSON; files are numbered once, since their names repeat in every tensor."""
    content: dict[str, Any] = {}
    for engine, tensors in engines.items():
        files = sorted({part.file for tensor in tensors for part in tensor.parts})
        number = {file: at for at, file in enumerate(files)}
        content[engine] = {
            "files": files,
            "tensors": [
                [t.name, t.slot, t.dtype, list(t.shape), [[number[p.file], p.start, p.stop] for p in t.parts]]
                for t in tensors
            ],
        }
    return json.dumps(content, separators=(",", ":")).encode()


class _IndexRecord(Config):
    """One engine's part of the index, as `index_bytes` writes it."""

    files: tuple[StoredName, ...]
    """Named once, since they repeat in every tensor."""
    tensors: tuple[tuple[str, str, str, _Sides, tuple[tuple[_Count, _Count, _Count], ...]], ...]
    """Name, slot, dtype, shape and parts: number of the file, first element, the one after the last."""


def parse_index(data: bytes) -> dict[str, list[StoredTensor]]:
    """What `index_bytes` wrote.

    Raises:
        CheckpointError: When it is anything else.
    """
    try:
        engines = decode(dict[str, _IndexRecord], parse_json(data), where=INDEX, refuse=CheckpointError)
        return {
            engine: [
                StoredTensor(name, slot, dtype, shape, [Part(record.files[f], start, stop) for f, start, stop in parts])
                for name, slot, dtype, shape, parts in record.tensors
            ]
            for engine, record in engines.items()
        }
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{INDEX}: damaged ({error})") from None
