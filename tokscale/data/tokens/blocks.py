"""Block tar, version 1: how token shards lie on disk.

An uncompressed, reproducible ustar file whose first member, `__tokscale__`, is a JSON description, and whose other
members are safetensors files of up to `block_size` samples each. Any tar or webdataset reader can stream it; with the
offsets of its sidecar, a block is one `pread`. A tar alone has no integrity (a cut between members ends silently), so
lengths and checksums live in the record that the writer returns.

Tensors of a block of k samples, little-endian; A is the number of variants (crops and flips) of an image:

| name | dtype, shape | meaning |
|---|---|---|
| `codes`, `codes.<stream>` | u16 or u32 `[k, *code_shape]`, or `[k, A, *code_shape]` | ids of the image tokenizers |
| `cap`, `cap_off`, `cap_row` | u8, u32 `[c+1]`, u32 `[k+1]` | captions in UTF-8: bytes, ends, each sample's captions |
| `key`, `key_off` | u8, u32 `[k+1]` | names of the samples |
| `src` | u32 `[k, 2]` | input shard's number in the plan, place within it |
| `wh` | u16 `[k, 2]` | width and height of the source image |
| `crop` | f32 `[k, 4]` or `[k, A, 4]` | x0 y0 x1 y1 in source pixels; x0 > x1 is mirrored |
| `hash` | u64 `[k]` | of `codes`: equal images have equal hashes |
| `text`, `text_off` | u16 or u32, u32 `[c+1]` | optional: ids of each caption, ragged |
| `label` | u32 `[k]` | optional: the sample's class |
| `score.<name>` | f32 `[k]` | optional: numbers of the source's metadata, NaN where absent |
"""

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import NonNegativeInt
from safetensors import SafetensorError

from tokscale.base.config import Config, StoredName
from tokscale.base.errors import DataError
from tokscale.data.tokens.remake import folder_of, repair

BLOCK_VERSION = 1
BLOCK_SIZE = 256
"""Samples per block: 150 KB at 256 codes, one request on a network file system."""
HEADER_MEMBER = "__tokscale__"
SUFFIX = "tok.safetensors"
_ENDS = ("cap_off", "cap_row", "key_off", "text_off")
_SECTOR = 512


@dataclass(frozen=True)
class TokenSample:
    """One image as codes, before it is packed."""

    key: str
    captions: Sequence[str]
    codes: Mapping[str, NDArray[Any]]
    """By stream: `codes`, `codes.low`, ...; `[*code_shape]` or `[A, *code_shape]`."""
    source: tuple[int, int]
    size: tuple[int, int]
    """Width and height of the source image."""
    crop: NDArray[np.float32]
    text: Sequence[NDArray[Any]] | None = None
    """Ids of each caption, if they are stored."""
    label: int | None = None
    """Class of the image, if it is stored."""
    scores: Mapping[str, float] = field(default_factory=dict)


class BlockRecord(NamedTuple):
    """Where a block's bytes lie in its shard, and their checksum."""

    offset: int
    size: int
    samples: int
    crc32: int


class ShardRecord(Config):
    """What a finished shard is: all that is needed to read and to verify it."""

    file: StoredName
    """Name within the folder of token shards."""
    bytes: NonNegativeInt
    """Size of the file."""
    sha256: str
    """Of the whole file."""
    samples: NonNegativeInt
    """In all its blocks."""
    blocks: tuple[BlockRecord, ...]
    """In file order."""


def code_dtype(num_tokens: int) -> np.dtype[Any]:
    """The smallest sufficient dtype of ids in `[0, num_tokens)`: signed 16 bit would wrap at 32,768."""
    return np.dtype("<u2" if num_tokens <= 1 << 16 else "<u4")


class Block:
    """The samples of one block, read lazily from its tensors."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]]):
        self.tensors = tensors
        self._bytes: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self.tensors["codes"])

    def captions(self, row: int) -> list[str]:
        """All captions of a sample."""
        first, last = self.tensors["cap_row"][row : row + 2].tolist()
        return self.caption_texts(np.arange(first, last))

    def caption_texts(self, numbers: NDArray[np.int64]) -> list[str]:
        """Captions by their number in the block; empty for -1."""
        return [text.decode() for text in self._slices("cap", numbers)]

    def caption_ids(self, numbers: NDArray[np.int64]) -> list[NDArray[Any]]:
        """Stored ids of captions by their number in the block; none for -1."""
        ids, ends = self.tensors["text"], self.tensors["text_off"]
        return [ids[ends[number] : ends[number + 1]] if number >= 0 else ids[:0] for number in numbers.tolist()]

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """Names of samples."""
        return [key.decode() for key in self._slices("key", rows)]

    def _slices(self, name: str, numbers: NDArray[np.int64]) -> Iterator[bytes]:
        if name not in self._bytes:
            self._bytes[name] = self.tensors[name].tobytes()
        joined, ends = self._bytes[name], self.tensors[f"{name}_off"]
        starts = ends[numbers].tolist()
        stops = ends[np.minimum(numbers + 1, len(ends) - 1)].tolist()
        for number, start, stop in zip(numbers.tolist(), starts, stops, strict=True):
            yield joined[start:stop] if number >= 0 else b""


def pack(samples: Sequence[TokenSample], dtypes: Mapping[str, np.dtype[Any]], text_dtype: Any = "<u2") -> bytes:
    """The bytes of a block; equal samples give equal bytes.

    Args:
        samples: At least one; all with the same streams and shapes.
        dtypes: Of each stream, see `code_dtype`.
        text_dtype: Of stored caption ids.
    """
    captions = [caption.encode() for sample in samples for caption in sample.captions]
    keys = [sample.key.encode() for sample in samples]
    tensors: dict[str, NDArray[Any]] = {
        name: np.ascontiguousarray(np.stack([sample.codes[name] for sample in samples]).astype(dtype))
        for name, dtype in dtypes.items()
    }
    tensors |= {
        "cap": _joined(captions),
        "cap_off": _ends([len(caption) for caption in captions]),
        "cap_row": _ends([len(sample.captions) for sample in samples]),
        "key": _joined(keys),
        "key_off": _ends([len(key) for key in keys]),
        "src": np.array([sample.source for sample in samples], "<u4"),
        "wh": np.minimum([sample.size for sample in samples], 0xFFFF).astype("<u2"),
        "crop": np.stack([sample.crop for sample in samples]).astype("<f4"),
        "hash": np.array([_hash(row) for row in tensors["codes"]], "<u8"),
    }
    if samples[0].text is not None:
        ids = [np.asarray(caption) for sample in samples for caption in sample.text or ()]
        tensors["text"] = np.concatenate([*ids, np.zeros(0, np.int64)]).astype(text_dtype)
        tensors["text_off"] = _ends([len(caption) for caption in ids])
    if samples[0].label is not None:
        tensors["label"] = np.array([sample.label for sample in samples], "<u4")
    for name in samples[0].scores:
        tensors[f"score.{name}"] = np.array([sample.scores[name] for sample in samples], "<f4")
    return safetensors.numpy.save(tensors)


def merge_blocks(blocks: Sequence[Block], names: Iterable[str]) -> Block:
    """One block with the samples of several, in order; only the named tensors."""
    tensors = {}
    for name in names:
        parts = [block.tensors[name] for block in blocks]
        if name in _ENDS:
            bases = np.cumsum([0, *(int(part[-1]) for part in parts[:-1])])
            parts = [
                part[min(at, 1) :].astype(np.int64) + base
                for at, (part, base) in enumerate(zip(parts, bases, strict=True))
            ]
        tensors[name] = np.concatenate(parts)
    return Block(tensors)


def unpack(data: bytes, where: str = "block") -> Block:
    """The block whose bytes these are.

    Raises:
        DataError: When they are not a block, naming `where`.
    """
    try:
        tensors = safetensors.numpy.load(data)
    except SafetensorError as error:
        raise DataError(f"{where}: not a token block ({error}); it was made by another program, or damaged") from None
    if "codes" not in tensors or "cap_row" not in tensors:
        raise DataError(f"{where}: a safetensors file without codes and captions is not a token block")
    return Block(tensors)


class ShardWriter:
    """Writes one block tar. The caller makes the file appear under its name only when `finish` has returned."""

    def __init__(self, file: IO[bytes], header: Mapping[str, Any], suffix: str = SUFFIX):
        """Begin with the header member.

        Args:
            file: Open for writing, at its beginning.
            header: JSON-ready description, equal for equal inputs.
            suffix: Of the blocks' names.
        """
        self._file, self._hash, self._offset, self._suffix = file, hashlib.sha256(), 0, suffix
        self._blocks: list[BlockRecord] = []
        self._samples = 0
        self._write(HEADER_MEMBER, json.dumps(header, sort_keys=True, separators=(",", ":")).encode())

    def add(self, block: bytes, samples: int) -> None:
        """Append a packed block."""
        offset = self._write(f"{self._samples:09d}.{self._suffix}", block)
        self._blocks.append(BlockRecord(offset, len(block), samples, zlib.crc32(block)))
        self._samples += samples

    def finish(self, name: str) -> ShardRecord:
        """Close the archive (not the file) and say what was written."""
        self._put(bytes(2 * _SECTOR))
        return ShardRecord(
            file=name,
            bytes=self._offset,
            sha256=self._hash.hexdigest(),
            samples=self._samples,
            blocks=tuple(self._blocks),
        )

    def _write(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)  # mtime, uid and gid are 0: equal content gives equal bytes
        info.size, info.mode = len(data), 0o444
        self._put(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._offset
        self._put(data)
        self._put(bytes(-len(data) % _SECTOR))
        return offset

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._offset += len(data)


def read_block(descriptor: int, record: BlockRecord, where: str) -> Block:
    """Read and check one block by its place.

    Args:
        descriptor: Of the open shard.
        record: Its place and checksum.
        where: The shard's path, for messages.

    Raises:
        DataError: When the bytes are missing or are not those that were written.
    """
    return checked_block(os.pread(descriptor, record.size, record.offset), record, where)


def checked_block(data: bytes, record: BlockRecord, where: str) -> Block:
    """The block of these bytes, which were read at its place; see `read_block`."""
    place = f"{where}: block at byte {record.offset}"
    if len(data) != record.size:
        raise DataError(
            f"{place} has {len(data)} of {record.size} bytes; the shard is cut off; {repair(folder_of(where))}"
        )
    if zlib.crc32(data) != record.crc32:
        raise DataError(f"{place} fails its checksum; the shard is damaged; {repair(folder_of(where))}")
    return unpack(data, place)


def open_block(path: Path, record: BlockRecord) -> Block:
    """Open a shard for one block; see `read_block`."""
    with open(path, "rb") as file:
        return read_block(file.fileno(), record, str(path))


def unpack_blocks(source: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A stage for webdataset pipelines: `wds.WebDataset(urls).compose(unpack_blocks)` streams single samples.

    Args:
        source: Undecoded webdataset samples of block tars.

    Yields:
        `__key__`, `__url__`, `captions` (a list), `txt` (the first of them), and each code stream as an array.
    """
    for member in source:
        if SUFFIX not in member:
            continue
        block = unpack(member[SUFFIX], f"{member.get('__url__', '')}: {member.get('__key__', '')}")
        streams = {name: array for name, array in block.tensors.items() if name.split(".")[0] == "codes"}
        for row, key in enumerate(block.keys(np.arange(len(block)))):
            captions = block.captions(row)
            yield {
                "__key__": key,
                "__url__": member.get("__url__", ""),
                "captions": captions,
                "txt": captions[0] if captions else "",
                **{name: array[row] for name, array in streams.items()},
            }


def _ends(lengths: Sequence[int]) -> NDArray[np.uint32]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype("<u4")


def _joined(parts: Sequence[bytes]) -> NDArray[np.uint8]:
    return np.array(bytearray(b"".join(parts)), np.uint8)


def _hash(codes: NDArray[Any]) -> int:
    return int.from_bytes(hashlib.blake2b(codes.tobytes(), digest_size=8).digest(), "little")
