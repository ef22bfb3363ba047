"""What closes a set of token shards: `dataset.json` says what it is, `index.safetensors` where each block lies.

The manifest carries the fingerprint of every tokenizer whose ids it holds, so that a model is never fed ids of another
one, and its own id, a hash of its content, so that a checkpoint knows which data it was trained on.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import safetensors.numpy
import torch
from pydantic import NonNegativeInt, PositiveInt

from tokscale.base.address import Address, address, is_address
from tokscale.base.config import Config, StoredName, decode, fingerprint
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.files import atomic_write, read_json, read_json_texts, sha256_file, write_json
from tokscale.base.protocols import ImageTokenizer, TextTokenizer
from tokscale.base.shapes import Int, Tensor
from tokscale.data.remote.config import RemoteConfig
from tokscale.data.tokens.blocks import Block, BlockRecord, ShardRecord, checked_block
from tokscale.data.tokens.files import DataFiles, files_of
from tokscale.data.tokens.remake import again, repair

MANIFEST = "dataset.json"
CLASSES = "classes.json"
"""Names of the labels, where there are any."""
INDEX = "index.safetensors"
CODES = "codes"
"""The main stream; others are named `codes.<name>`."""
_AHEAD = 64
"""Blocks that are asked for before they are read, where all are read in order."""

C = TypeVar("C", bound=Config)


class StreamRecord(Config):
    """Whose ids a stream of codes holds."""

    tokenizer: str
    """Fingerprint of the image tokenizer."""
    num_tokens: PositiveInt
    """Ids are in `[0, num_tokens)`."""
    code_shape: tuple[PositiveInt, ...]
    """Of one sample (and one variant)."""
    image_size: PositiveInt
    """Side of the images that were encoded, in pixels; the shorter side for aspect buckets."""

    @classmethod
    def of(cls, tokenizer: ImageTokenizer) -> "StreamRecord":
        """What there is to say about a tokenizer."""
        return cls(
            tokenizer=tokenizer.fingerprint,
            num_tokens=tokenizer.num_tokens,
            code_shape=tuple(tokenizer.code_shape),
            image_size=tokenizer.image_size,
        )


class TextRecord(Config):
    """Whose caption ids are stored."""

    tokenizer: str
    """Fingerprint of the text tokenizer."""
    num_tokens: PositiveInt
    """Size of its vocabulary."""
    length: PositiveInt
    """Captions were cut to so many ids."""


class ShardEntry(Config):
    """One shard of a data set."""

    file: StoredName
    bytes: NonNegativeInt
    sha256: str
    samples: NonNegativeInt
    blocks: NonNegativeInt


class TokenManifest(Config):
    """The content of `dataset.json`."""

    format: Literal["tokscale-tokens"] = "tokscale-tokens"
    version: Literal[1] = 1
    run: str
    """Fingerprint of the tokenization that made it: tokenizers, transform, text settings, batch size."""
    streams: dict[str, StreamRecord]
    """By name; `codes` is always there."""
    variants: PositiveInt = 1
    """Crops and flips stored for each image."""
    text: TextRecord | None = None
    """Set when caption ids are stored beside the captions."""
    labels: NonNegativeInt | None = None
    """Set when class labels are stored: they are in `[0, labels)`."""
    samples: NonNegativeInt
    """In all shards."""
    drops: dict[str, int] = {}
    """Input samples that were left out, by reason."""
    shards: tuple[ShardEntry, ...]
    """In the order of their units."""
    index_sha256: str
    """Of `index.safetensors`."""

    @property
    def id(self) -> str:
        """Hash of all the above: two data sets with equal ids hold the same samples in the same order."""
        return fingerprint(self.content)

    @property
    def content(self) -> dict[str, Any]:
        """JSON-ready. What was added later and is absent leaves no trace, so that older data sets keep their ids."""
        values = self.model_dump(mode="json")
        return {name: value for name, value in values.items() if name != "labels" or value is not None}


def read_record(kind: type[C], path: Path) -> C:
    """Read one of our JSON records.

    Raises:
        DataError: When the file is missing, is not JSON, or is not such a record.
    """
    try:
        return decode(kind, read_json(path))
    except ConfigError as error:
        raise DataError(f"{path}: not a {kind.__name__} of this version ({error}); it was edited or damaged") from None


def write_manifest(folder: Path, shards: Sequence[ShardRecord], **values: Any) -> TokenManifest:
    """Close a folder of token shards: the index first, then `dataset.json`.

    Args:
        folder: Where the shards lie.
        shards: In their order.
        values: The other fields of `TokenManifest`.
    """
    places = np.concatenate([np.array(shard.blocks, np.int64).reshape(-1, 4) for shard in shards])
    owners = np.repeat(np.arange(len(shards)), [len(shard.blocks) for shard in shards])
    columns = {"shard": owners.astype("<u4"), "offset": places[:, 0].astype("<u8")}
    columns |= {name: places[:, at].astype("<u4") for at, name in enumerate(("size", "samples", "crc32"), start=1)}
    with atomic_write(folder / INDEX) as file:
        file.write(safetensors.numpy.save({name: np.ascontiguousarray(column) for name, column in columns.items()}))
    manifest = TokenManifest(
        samples=sum(shard.samples for shard in shards),
        shards=tuple(
            ShardEntry(
                file=shard.file,
                bytes=shard.bytes,
                sha256=shard.sha256,
                samples=shard.samples,
                blocks=len(shard.blocks),
            )
            for shard in shards
        ),
        index_sha256=sha256_file(folder / INDEX),
        **values,
    )
    write_json(folder / MANIFEST, manifest.content | {"id": manifest.id})
    return manifest


def read_token_manifest(folder: Path | Address, files: DataFiles | None = None) -> TokenManifest:
    """Read and check `dataset.json`.

    Args:
        folder: Of the token shards.
        files: Its files, where it lies behind an address.

    Raises:
        DataError: When tokenization is not finished, or the file was edited.
    """
    path, stored = folder / MANIFEST, folder / MANIFEST if files is None else files.small(MANIFEST)
    if isinstance(folder, Path) and not folder.joinpath(MANIFEST).exists():
        if buckets := buckets_in(folder):
            raise DataError(
                f"{folder}: holds a data set for each shape of images, {', '.join(found.name for found in buckets)}; "
                f"name the folder of one: {buckets[0]}"
            )
        begun = (folder / "plan").exists()  # what closes it, or says what is missing, needs no key of the tokenization
        words = again(folder, *["action=finalise"] * begun)
        raise DataError(f"{path}: no such file; tokenization is not finished here, run {words}")
    values = read_json(stored)
    stated = values.pop("id", None) if isinstance(values, dict) else None
    try:
        manifest = decode(TokenManifest, values)
    except ConfigError as error:
        raise DataError(f"{path}: not a manifest of token shards ({error}); {_rewrite(folder)}") from None
    if manifest.id != stated:
        differ = f"its content has the id {manifest.id[:12]} but it states {str(stated)[:12]}"
        raise DataError(f"{path}: {differ}; {_rewrite(folder)}")
    return manifest


def read_class_names(folder: Path | str, remote: RemoteConfig) -> list[str] | None:
    """Names of a data set's labels, None where it has none.

    Raises:
        DataError: When their file is damaged.
    """
    files = files_of(folder, remote, repair(folder if isinstance(folder, Address) else Path(folder)))
    return read_json_texts(files.small(CLASSES)) if files.has(CLASSES) else None


def buckets_in(folder: Path) -> list[Path]:
    """The data sets in a folder that holds one for each shape of images, by name; none where it is one itself."""
    return [] if (folder / MANIFEST).exists() else sorted(found.parent for found in folder.glob(f"*/{MANIFEST}"))


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _rewrite(folder: Path | Address) -> str:
    return f"it was edited or damaged: run {again(folder, 'action=finalise')} to write it again"


class TokenDataset:
    """An open set of token shards: block sizes in memory, blocks read by offset. Safe to use from several threads."""

    def __init__(self, folder: Path | str, remote: RemoteConfig | None = None):
        """Open a finished folder.

        Args:
            folder: On this machine, or an address such as `s3://bucket/tokens`.
            remote: How an address is read.

        Raises:
            DataError: When it is not finished, or its index is not the manifest's.
        """
        if isinstance(folder, str) and is_address(folder):
            folder = address(folder)
        self.folder: Path | Address = folder if isinstance(folder, Address) else Path(folder)
        self.remote = remote or RemoteConfig()
        self.files = files_of(self.folder, self.remote, repair(self.folder))
        self.manifest = read_token_manifest(self.folder, self.files)
        path = self.files.small(INDEX)
        if not path.exists() or sha256_file(path) != self.manifest.index_sha256:
            raise DataError(
                f"{self.folder / INDEX}: missing or not the index that {MANIFEST} names; {_rewrite(self.folder)}"
            )
        self._index = safetensors.numpy.load_file(path)
        self._sizes = torch.from_numpy(self._index["samples"].astype(np.int32))

    @property
    def sizes(self) -> Int[Tensor, "blocks"]:
        """Samples of each block."""
        return self._sizes

    @property
    def samples(self) -> int:
        """Images in the data set."""
        return self.manifest.samples

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Of the main stream."""
        return self.manifest.streams[CODES].code_shape

    def read(self, block: int) -> Block:
        """Read one block by its number in the data set.

        Raises:
            DataError: When it is missing or damaged.
        """
        shard, place = self._place(block)
        name = self.manifest.shards[shard].file
        where = str(self.folder / name)
        found = checked_block(self.files.read(name, place.offset, place.size, place.crc32), place, where)
        if len(found) != place.samples:
            raise DataError(
                f"{where}: block at byte {place.offset} has {len(found)} samples, the index says {place.samples}"
            )
        return found

    def expect(self, blocks: Sequence[int]) -> None:
        """Begin to fetch blocks that will be read soon; where the shards lie on this machine, the kernel does that."""
        if self.is_remote:
            found = [self._place(block) for block in blocks]
            self.files.expect([(self.manifest.shards[shard].file, place.offset, place.size) for shard, place in found])

    def blocks(self) -> Iterator[Block]:
        """All blocks in order.

        Raises:
            DataError: As for `read`.
        """
        for number in range(len(self._sizes)):
            if number % _AHEAD == 0:
                self.expect(range(number, min(number + _AHEAD, len(self._sizes))))
            yield self.read(number)

    @property
    def is_remote(self) -> bool:
        """Whether its shards lie behind an address."""
        return isinstance(self.folder, Address)

    def _place(self, block: int) -> tuple[int, BlockRecord]:
        """The number of a block's shard, and its place there."""
        shard, offset, size, samples, crc32 = (
            int(self._index[name][block]) for name in ("shard", "offset", "size", "samples", "crc32")
        )
        return shard, BlockRecord(offset, size, samples, crc32)

    def stream(self, name: str) -> StreamRecord:
        """What is known of a stream of codes.

        Raises:
            DataError: When it is not stored.
        """
        if name not in self.manifest.streams:
            stored = ", ".join(sorted(self.manifest.streams))
            raise DataError(f"{self.folder}: has no stream {name!r}, only {stored}; tokenize it into another folder")
        return self.manifest.streams[name]

    def require(self, tokenizers: Mapping[str, ImageTokenizer | StreamRecord]) -> None:
        """Refuse ids of other tokenizers than these.

        Args:
            tokenizers: By stream name; the main one is `codes`.

        Raises:
            DataError: Naming the stream, both fingerprints and the way out.
        """
        for name, tokenizer in tokenizers.items():
            wanted = tokenizer.tokenizer if isinstance(tokenizer, StreamRecord) else tokenizer.fingerprint
            stored = self.stream(name)
            if stored.tokenizer != wanted:
                ours, theirs = f"{wanted[:12]}", f"{stored.tokenizer[:12]}"
                if stored.code_shape != tuple(tokenizer.code_shape):
                    ours += f" for codes of {_by(tokenizer.code_shape)}"
                    theirs += f" for codes of {_by(stored.code_shape)}"
                raise DataError(
                    f"{self.folder}: {name} holds ids of the image tokenizer {theirs}, but this run uses {ours}; name "
                    f"the tokenizer that made them, or tokenize again into another folder"
                )

    def stored_text(self, tokenizer: TextTokenizer, length: int) -> bool:
        """Whether stored caption ids are what `tokenizer` would give at this length."""
        text = self.manifest.text
        return text is not None and (text.tokenizer, text.length) == (tokenizer.fingerprint, length)

    def close(self) -> None:
        """Close the shards that are open."""
        self.files.close()
