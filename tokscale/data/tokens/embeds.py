"""States of a text encoder beside token shards: `embeds/`, one shard for each token shard, with the same blocks.

States take 50 to 1000 times the room of codes, so a loader does not hold them by the window: it reads those of each
chosen caption by their place. Each caption has its own checksum for that.

Tensors of a block whose captions have w tokens in all; the caption numbers are those of the token block, and the last
entry is the empty caption, for samples that have none:

| name | dtype, shape | meaning |
|---|---|---|
| `states` | bf16 or f32 `[w, width]` | states of all captions, without padding |
| `ends` | i64 `[captions + 2]` | where each caption's states begin |
| `crc32` | i64 `[captions + 1]` | of the bytes of each caption's states |
"""

import json
import struct
import threading
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import NonNegativeInt, PositiveInt

from tokscale.base.config import Config, PathKey, fingerprint
from tokscale.base.errors import DataError
from tokscale.base.shapes import Float, Tensor
from tokscale.data.tokens.blocks import ShardRecord
from tokscale.data.tokens.files import files_of
from tokscale.data.tokens.manifest import TokenDataset, read_record
from tokscale.data.tokens.remake import again, repair

FOLDER = "embeds"
ABOUT = "about.json"
BLOCK_SUFFIX = "emb.safetensors"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PLACES = 1024
"""Blocks whose captions' places stay in memory: some kilobytes each."""


class EmbedsAbout(Config):
    """The content of `about.json`: whose states these are."""

    format: Literal["tokscale-embeds"] = "tokscale-embeds"
    version: Literal[1] = 1
    path: PathKey
    """Where the text encoder lay."""
    encoder: str
    """Its fingerprint."""
    precision: Literal["fp32", "bf16"]
    """Of the states; part of the fingerprint, as is the next."""
    length: PositiveInt
    """Captions were cut to so many of the encoder's tokens."""
    width: PositiveInt
    """Of each state."""


class EmbedsRecord(Config):
    """The commit of one shard, `embeds-000000.json`: with it, and a shard of its size, the shard is done."""

    format: Literal["tokscale-embeds-shard"] = "tokscale-embeds-shard"
    version: Literal[1] = 1
    encoder: str
    """Fingerprint of the text encoder."""
    tokens: str
    """sha256 of the token shard whose captions these are."""
    words: NonNegativeInt
    """States in the shard."""
    shard: ShardRecord


def shard_names(token_shard: str) -> tuple[str, str]:
    """Names of the shard of states and of its record, from that of the token shard."""
    stem = token_shard.removesuffix(".tar").replace("tokens", FOLDER)
    return f"{stem}.tar", f"{stem}.json"


def read_about(folder: Path) -> EmbedsAbout | None:
    """Whose states a folder of token shards on this machine has beside it, None when it has none.

    Raises:
        DataError: When the description was damaged.
    """
    path = folder / FOLDER / ABOUT
    return read_record(EmbedsAbout, path) if path.exists() else None


def is_embedded(dataset: TokenDataset, encoder: str, token_shard: str, tokens: str) -> EmbedsRecord | None:
    """The record of a shard that is done: of this encoder, for a token shard with this sha256; None if it is not."""
    name, record_name = shard_names(token_shard)
    try:
        record = read_record(EmbedsRecord, dataset.files.small(f"{FOLDER}/{record_name}"))
        size = dataset.files.size(f"{FOLDER}/{name}")
    except DataError:
        return None
    return record if (record.encoder, record.tokens, record.shard.bytes) == (encoder, tokens, size) else None


class _Places(NamedTuple):
    """Where the captions of one block lie."""

    states: int
    """First byte of the block's states in the shard."""
    ends: NDArray[np.int64]
    crc32: NDArray[np.int64]


class EmbedStore:
    """Opened states of all captions of a data set. Safe to use from several threads."""

    def __init__(self, dataset: TokenDataset):
        """Open what lies beside `dataset`.

        Raises:
            DataError: When there is nothing, or not for each of its shards.
        """
        self._files = files_of(dataset.folder, dataset.remote, repair(dataset.folder, "action=embed"))
        if not self._files.has(f"{FOLDER}/{ABOUT}"):
            raise DataError(f"{dataset.folder}: has no {FOLDER}/; run {again(dataset.folder, 'action=embed')}")
        about = read_record(EmbedsAbout, self._files.small(f"{FOLDER}/{ABOUT}"))
        self.about, self.width, self.fingerprint = about, about.width, about.encoder
        self._folder = dataset.folder / FOLDER
        self._blocks: list[tuple[str, int]] = []
        shards = []
        for entry in dataset.manifest.shards:
            record = is_embedded(dataset, about.encoder, entry.file, entry.sha256)
            if record is None:
                raise DataError(
                    f"{self._folder}: the states of {entry.file} are missing or of other captions; run "
                    f"{again(dataset.folder, 'action=embed')}"
                )
            self._blocks += [(record.shard.file, place.offset) for place in record.shard.blocks]
            shards.append(record.shard.sha256)
        self.id = fingerprint(shards)
        self._places: OrderedDict[int, _Places] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored states."""
        return _DTYPES[self.about.precision]

    def read(self, block: int, caption: int) -> Float[Tensor, "words width"]:
        """States of a caption by its number in a block of the data set; -1 is the empty caption.

        Raises:
            DataError: When bytes are missing or are not those that were written.
        """
        row, name = self.width * self.dtype.itemsize, self._blocks[block][0]
        with self._lock:
            places = self._of(block)
        ends = places.ends[caption : caption + 2] if caption >= 0 else places.ends[-2:]
        first, last, wanted = int(ends[0]), int(ends[1]), int(places.crc32[caption])
        data = self._bytes(name, places.states + first * row, (last - first) * row, wanted)
        if len(data) != (last - first) * row or zlib.crc32(data) != places.crc32[caption]:
            raise DataError(
                f"{self._folder / name}: caption {caption} of the block whose states begin at byte {places.states} "
                f"fails its checksum; {self._repair()}"
            )
        if not data:
            return torch.empty(0, self.width, dtype=self.dtype)
        return torch.frombuffer(bytearray(data), dtype=self.dtype).view(last - first, self.width)

    def close(self) -> None:
        """Close the shards that are open."""
        self._files.close()

    def _bytes(self, name: str, offset: int, size: int, checksum: int | None = None) -> bytes:
        return self._files.read(f"{FOLDER}/{name}", offset, size, checksum)

    def _of(self, block: int) -> _Places:
        if block in self._places:
            self._places.move_to_end(block)
            return self._places[block]
        name, offset = self._blocks[block]
        try:
            (size,) = struct.unpack("<Q", self._bytes(name, offset, 8))
            header = json.loads(self._bytes(name, offset + 8, size))
            tensors = {key: header[key]["data_offsets"] for key in ("states", "ends", "crc32")}
        except (struct.error, ValueError, KeyError, MemoryError, OverflowError, OSError) as error:
            raise DataError(
                f"{self._folder / name}: no block of states at byte {offset} ({error}); {self._repair()}"
            ) from None
        start = offset + 8 + size
        whole = {
            key: np.frombuffer(self._bytes(name, start + at, stop - at), "<i8")
            for key, (at, stop) in tensors.items()
            if key != "states"
        }
        found = self._places[block] = _Places(start + tensors["states"][0], whole["ends"], whole["crc32"])
        if len(self._places) > _PLACES:
            self._places.popitem(last=False)
        return found

    def _repair(self) -> str:
        return repair(self._folder.parent, "action=embed")

    def __getstate__(self) -> dict[str, Any]:
        """As that of `TokenDataset`."""
        return {name: value for name, value in vars(self).items() if name not in ("_places", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _places=OrderedDict(), _lock=threading.Lock())
