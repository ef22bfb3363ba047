"""safetensors files, written as a stream and read by byte range.

The safetensors library writes from whole tensors and reads through a memory map. A checkpoint needs neither: a shard
is written while it is copied from the device, hashed on the way, through a `Disk`; and a rank reads only the ranges it
needs, where a damaged file must be an error, not a bus error. The files are ordinary safetensors for everyone else.
"""

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokscale.base.errors import CheckpointError
from tokscale.base.files import parse_json, refusal_of
from tokscale.checkpoint.disk import Disk

CHUNK_BYTES = 2 << 20
"""How much is copied, hashed and written at once."""
_SYNC_BYTES = 16 << 20
"""How much is written before the medium is told to begin with it."""
_HEADER_LIMIT = 100_000_000
"""Bytes of a header: the format's own limit."""
_LARGEST, _MOST_SIDES = 2**63, 64
_T = TypeVar("_T")

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def dtype_code(dtype: torch.dtype) -> str:
    """The safetensors name of a dtype, e.g. `"BF16"`.

    Raises:
        CheckpointError: When the dtype cannot be stored.
    """
    if dtype not in _CODES:
        raise CheckpointError(f"tensors of {dtype} cannot be stored; one of {', '.join(map(str, _CODES))} can")
    return _CODES[dtype]


def dtype_of(code: str) -> torch.dtype:
    """The dtype of a safetensors name."""
    if code not in _DTYPES:
        raise CheckpointError(f"unknown tensor type {code!r}; the file was written by a newer version")
    return _DTYPES[code]


@dataclass(frozen=True)
class Entry:
    """One tensor to write: what the header says, and its bytes as flat chunks in order."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """What `write_tensors` left behind."""

    nbytes: int
    sha256: str
    """Of the whole file."""
    tensors: Mapping[str, str]
    """sha256 of each tensor's bytes; filled only when asked for, the file's own is then empty."""


def write_tensors(
    disk: Disk, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str], *, hash_each: bool = False
) -> Written:
    """Write a new safetensors file and make it durable.

    Args:
        disk: Through which every system call goes.
        path: Must not exist.
        entries: Written with the widest dtype first, so that every tensor is aligned.
        metadata: Strings for the header.
        hash_each: Hash every tensor instead of the file.
    """
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header = _header(entries, metadata)
    whole = hashlib.sha256(header)
    each = {entry.key: hashlib.sha256() for entry in entries} if hash_each else {}
    left = {entry.key: entry.nbytes for entry in entries}
    pieces = ((entry.key, as_bytes(chunk)) for entry in entries for chunk in entry.chunks())
    at, begun = len(header), 0
    descriptor = disk.create(path)
    try:
        disk.write(descriptor, memoryview(header))
        # Fetching, hashing and writing all let go of the interpreter, so the slowest of them is what a piece costs.
        with ThreadPoolExecutor(2, "tensors") as pool:
            for key, data in _ahead(pool, pieces):
                hashed = pool.submit(each.get(key, whole).update, data)
                disk.write(descriptor, data)
                hashed.result()
                left[key] -= len(data)
                at += len(data)
                if at - begun >= _SYNC_BYTES:
                    disk.begin_sync(descriptor, begun, at - begun)
                    begun = at
        disk.sync(descriptor)
    finally:
        disk.close(descriptor)
    assert not any(left.values()), f"{path}: tensors and header disagree by {left} bytes"
    nbytes = len(header) + sum(entry.nbytes for entry in entries)
    return Written(nbytes, "" if hash_each else whole.hexdigest(), {key: h.hexdigest() for key, h in each.items()})


def _ahead(pool: ThreadPoolExecutor, items: Iterator[_T]) -> Iterator[_T]:
    """The same items, each fetched while the one before it is in use."""
    coming = pool.submit(next, items, None)
    while (item := coming.result()) is not None:
        coming = pool.submit(next, items, None)
        yield item


def as_bytes(flat: Tensor) -> memoryview:
    """The bytes of a contiguous one-dimensional CPU tensor, without a copy."""
    return flat.detach().view(torch.uint8).numpy().data


def host_chunks(flat: Tensor) -> Iterable[Tensor]:
    """A one-dimensional tensor in pieces of at most `CHUNK_BYTES`, each on the CPU and contiguous."""
    size = max(CHUNK_BYTES // flat.dtype.itemsize, 1)
    for start in range(0, flat.numel(), size):
        yield flat.detach()[start : start + size].to("cpu").contiguous()


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for entry in entries:
        assert entry.key not in content, f"{entry.key}: stored twice"
        content[entry.key] = {
            "dtype": dtype_code(entry.dtype),
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _checked(content: Any, size: int) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and entries of a header: each as long as its type and shape say, and all bytes are some entry's.

    Args:
        content: What the header holds.
        size: Bytes behind it.

    Raises:
        ValueError: Naming the entry that is not so.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no texts")
    for key, entry in content.items():
        match entry:
            case {"dtype": str(code), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if len(
                shape
            ) <= _MOST_SIDES and all(type(side) is int and 0 <= side < _LARGEST for side in shape):
                if code in _DTYPES and stop - start != math.prod(shape) * _DTYPES[code].itemsize:
                    raise ValueError(
                        f"{key[:200]!r} has {stop - start} bytes, not those of {code} of shape {shape[:8]}"
                    )
                if not 0 <= start <= stop:
                    raise ValueError(f"{key[:200]!r} lies at bytes {start} to {stop}")
                if stop > size:
                    raise ValueError(f"truncated: {key[:200]!r} ends at byte {stop} of {size}")
            case _:
                raise ValueError(f"{key[:200]!r} is {str(entry)[:200]}")
    end = 0
    for key, entry in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if start < end:
            raise ValueError(f"{key[:200]!r} overlaps another tensor")
        if start > end:
            raise ValueError(f"{start - end} bytes before {key[:200]!r} belong to no tensor")
        end = stop
    if size > end:
        raise ValueError(f"{size - end} bytes after the last tensor belong to none")
    return metadata, content


class TensorFile:
    """One safetensors file, read by range. Close it after use."""

    def __init__(self, path: Path):
        """Open and parse the header.

        Raises:
            CheckpointError: When it is missing, truncated or not a safetensors file.
        """
        self.path = path
        try:
            # Without waiting for a writer, as a pipe would.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CheckpointError(f"{path}: {refusal_of(error)}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise CheckpointError(f"{path}: is no regular file")
            self.metadata, self._entries, self._data_at = self._parse()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the descriptor."""
        os.close(self._descriptor)

    def keys(self) -> tuple[str, ...]:
        """The stored tensors' keys, in the file's order."""
        return tuple(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return tuple(self._entries[key]["shape"])

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a stored tensor."""
        code = self._entries[key]["dtype"]
        if code not in _DTYPES:
            raise CheckpointError(f"{self.path}: {key!r} has the unknown type {code[:40]!r}, of a newer version")
        return dtype_of(code)

    def read(self, key: str, start: int, out: Tensor) -> None:
        """Fill the one-dimensional `out` with the tensor's elements from `start` on.

        Raises:
            CheckpointError: When the tensor is not in the file, has another dtype, or ends too early.
        """
        entry = self._entries.get(key)
        if entry is None or entry["dtype"] != dtype_code(out.dtype):
            found = "nothing" if entry is None else entry["dtype"]
            raise CheckpointError(f"{self.path}: expected {dtype_code(out.dtype)} under {key!r}, found {found}")
        first, end = (self._data_at + offset for offset in entry["data_offsets"])
        at = first + start * out.dtype.itemsize
        target = as_bytes(out)
        if at + len(target) > end:
            raise CheckpointError(f"{self.path}: {key!r} ends before element {start + out.numel()}")
        self._fill(at, target)

    def _parse(self) -> tuple[dict[str, str], dict[str, Any], int]:
        size = os.fstat(self._descriptor).st_size
        prefix = bytearray(8)
        self._fill(0, memoryview(prefix))
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(f"{self.path}: truncated, or not a safetensors file")
        text = bytearray(length)
        self._fill(8, memoryview(text))
        try:
            metadata, entries = _checked(parse_json(text), size - 8 - length)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: the header is damaged ({error})") from error
        return metadata, entries, 8 + length

    def _fill(self, at: int, target: memoryview) -> None:
        while target:
            try:
                count = os.preadv(self._descriptor, [target], at)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {refusal_of(error)} at byte {at}") from error
            if count == 0:
                raise CheckpointError(f"{self.path}: truncated at byte {at}")
            at, target = at + count, target[count:]
