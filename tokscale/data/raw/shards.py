"""Images and captions in tars, in the layout that img2dataset writes: `key.jpg`, `key.txt`, perhaps `key.json`.

A tar says nothing about its own wholeness: readers that stream one take a cut between members, or a damaged header,
for its end. So a shard is first walked, header by header, to its end mark; after that every sample is known by the
offset of its bytes and is read by `pread`, in any order, from any thread.
"""

import itertools
import json
import os
import tarfile
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, cast

from pydantic import NonNegativeInt

from tokscale.base.address import Address
from tokscale.base.config import Config, StoredName, decode
from tokscale.base.errors import DataError
from tokscale.base.files import atomic_write, open_regular, read_json
from tokscale.base.text import is_blank, lines_of
from tokscale.data.raw.bad_samples import BadSample, Reason
from tokscale.data.raw.captions import CAPTIONS, captions_in_json, checked_caption, listed_captions
from tokscale.data.raw.paths import is_hidden
from tokscale.data.raw.tars import is_gzip, unpacked, walk

MANIFEST = "manifest.json"
_OF_TOKENS = ("dataset.json", "index.safetensors")
"""What closes a folder of token shards, see `data.tokens.manifest`."""
IMAGE_ENDINGS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    *("jfif", "jpe", "avif", "jxl", "heic", "heif"),
)
SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz")
_OPEN_SHARDS = 64


@dataclass(frozen=True)
class Member:
    """Where a file's bytes lie in its shard."""

    offset: int
    size: int


@dataclass(frozen=True)
class RawSample:
    """The files of one key."""

    key: str
    offset: int
    """Of the sample's first header in the shard."""
    members: Mapping[str, Member]
    """By ending, in lower case."""
    flaw: tuple[Reason, str] | None = None
    """Why the sample as such cannot be used, in a word and in detail; reading anything of it raises `BadSample`."""


class ShardChanged(DataError):  # noqa: N818 - reads as what happened
    """A shard is another file than when it was opened: to be looked at again."""


class RawShard:
    """One tar of samples, walked and open. Reading is safe from many threads.

    One that was compressed by gzip is unpacked into the machine's temporary folder for as long as it is open.
    """

    def __init__(self, path: Path | str, descriptor: int | None = None):
        """Walk a shard.

        Args:
            path: Of the file, for messages where `descriptor` is given.
            descriptor: Of the file or its copy, already open; closed with the shard.

        Raises:
            DataError: When it is missing, not a tar, damaged, or shorter than it was written.
        """
        self.path = path if isinstance(path, Address) else Path(path)
        self._descriptor = -1 if descriptor is None else descriptor
        if descriptor is None:
            self._descriptor = open_regular(self.path)
        if is_gzip(self._descriptor):
            packed, self._descriptor = self._descriptor, -1  # which is closed, whatever comes of it
            self._descriptor = unpacked(packed, self.path)
        with open(self._descriptor, "rb", closefd=False) as file:
            members = walk(file, self.path)
        kept = [member for member in members if not is_hidden(member.name)]
        self.hidden = len(members) - len(kept)
        """Files that no data set means, see `is_hidden`."""
        self.samples: Sequence[RawSample] = _grouped(kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def image(self, sample: RawSample, member: str | None = None) -> bytes:
        """The image file of a sample: the one with the ending `member`, or the first that is an image.

        Raises:
            BadSample: When there is none, or the sample is flawed.
        """
        endings = IMAGE_ENDINGS if member is None else (member,)
        ending = next((ending for ending in endings if ending in sample.members), None)
        if ending is None:
            raise BadSample(*(sample.flaw or ("image_missing", f"only {', '.join(sample.members)}")))
        return self.read(sample, ending)

    def caption(self, sample: RawSample) -> str:
        """The caption file of a sample, without the white space around it.

        Raises:
            BadSample: When there is none, it is blank or not UTF-8, or the sample is flawed.
        """
        if "txt" not in sample.members:
            raise BadSample(*(sample.flaw or ("caption_missing", f"only {', '.join(sample.members)}")))
        return checked_caption(self.read(sample, "txt"))

    def captions(
        self, sample: RawSample, *, split_lines: bool = False, member: str = "txt", field: str | None = None
    ) -> tuple[str, ...]:
        """All captions of a sample: those that `prepare` listed, or the one of its caption file.

        Args:
            sample: Whose.
            split_lines: Take every line of a caption file for a caption of its own.
            member: Ending of the caption file in tars of others.
            field: Where the caption is in a JSON file, with dots between names: a text, or a list of texts.

        Raises:
            BadSample: As `caption` does, or when the list is not one of texts.
        """
        if field is not None:
            return captions_in_json(self._member(sample, member), field)
        if member != "txt":
            text = checked_caption(self._member(sample, member))
        elif CAPTIONS in sample.members:
            return listed_captions(self.read(sample, CAPTIONS))
        else:
            text = self.caption(sample)
        return tuple(line for line in lines_of(text) if not is_blank(line)) if split_lines else (text,)

    def label(self, sample: RawSample) -> int:
        """The class of a sample: its `.cls` file, or `label` of its JSON.

        Raises:
            BadSample: When it has none.
        """
        stated: Any = None
        if "cls" in sample.members:
            text = self.read(sample, "cls").decode(errors="replace").strip()
            stated = int(text) if text.isdecimal() and text.isascii() else text
        elif "json" in sample.members:
            with suppress(ValueError, AttributeError):
                stated = json.loads(self.read(sample, "json")).get("label")
        if not isinstance(stated, int) or isinstance(stated, bool) or not 0 <= stated < 1 << 32:
            raise BadSample("label", f"{stated!r} in .cls or under `label` in .json; classes are numbers from 0 on")
        return stated

    def _member(self, sample: RawSample, ending: str) -> bytes:
        if ending not in sample.members:
            raise BadSample(*(sample.flaw or ("caption_missing", f"only {', '.join(sample.members)}")))
        return self.read(sample, ending)

    def read(self, sample: RawSample, ending: str) -> bytes:
        """The bytes of one of a sample's files.

        Raises:
            BadSample: When the sample is flawed.
            DataError: When the shard was cut since it was walked.
        """
        if sample.flaw is not None:
            raise BadSample(*sample.flaw)
        member = sample.members[ending]
        data = os.pread(self._descriptor, member.size, member.offset)
        if len(data) != member.size:
            raise ShardChanged(f"{self.path}: became shorter while it was read; is it still being written?")
        return data


class RawDataset:
    """A folder of raw shards as one sequence of samples, read by number. Shards are walked when first touched."""

    def __init__(self, folder: Path | str):
        """Find the shards, and count their samples: from the manifest, or by walking all of them.

        Raises:
            DataError: When there are none.
        """
        self.folder = Path(folder)
        self.paths = shard_paths(self.folder)
        self._open: OrderedDict[int, RawShard] = OrderedDict()
        self._lock = threading.Lock()
        manifest = read_raw_manifest(self.folder)
        known = {shard.file: shard.samples for shard in manifest.shards} if manifest else {}
        names = [path.relative_to(self.folder).as_posix() for path in self.paths]
        counts = [known[name] if name in known else len(self._shard(n).samples) for n, name in enumerate(names)]
        self._starts = list(itertools.accumulate(counts, initial=0))

    def __getstate__(self) -> dict[str, Any]:
        """What another rank needs of it, so that one alone looks into the folder and tells the others."""
        return {name: value for name, value in vars(self).items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _open=OrderedDict(), _lock=threading.Lock())

    def __len__(self) -> int:
        return self._starts[-1]

    def sample(self, index: int) -> tuple[RawShard, RawSample]:
        """Sample `index`, and the shard to read it from.

        Raises:
            DataError: When its shard is damaged or holds another number of samples than the manifest says.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        shard = self._shard(number)
        expected = self._starts[number + 1] - self._starts[number]
        if len(shard.samples) != expected:
            raise DataError(
                f"{shard.path}: holds {len(shard.samples)} samples, {MANIFEST} says {expected}; run prepare again"
            )
        return shard, shard.samples[index - self._starts[number]]

    def _shard(self, number: int) -> RawShard:
        with self._lock:
            if number not in self._open:
                self._open[number] = RawShard(self.paths[number])
            self._open.move_to_end(number)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)  # closes when its last reader lets go of it
            return self._open[number]


class ShardRecord(Config):
    """One shard of a manifest."""

    file: StoredName
    bytes: NonNegativeInt
    samples: NonNegativeInt
    sha256: str


class RawManifest(Config):
    """What `prepare` made: written last, so that its presence says that all of it is there."""

    format: Literal["tokscale-raw"] = "tokscale-raw"
    version: Literal[1] = 1
    fingerprint: str
    """Of everything that decides the content."""
    source: dict[str, Any]
    """The source's configuration, for people."""
    samples: NonNegativeInt
    drops: dict[str, int]
    """Source samples that were left out, by reason."""
    shards: tuple[ShardRecord, ...]
    classes: tuple[str, ...] | None = None
    """Names of the samples' labels, where they have any."""
    captions: bool = True
    """Whether every sample has a caption."""


def read_raw_manifest(folder: Path) -> RawManifest | None:
    """The manifest of a folder, None when it has none (img2dataset's folders do not).

    Raises:
        DataError: When it is damaged or not ours.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    return decode(RawManifest, read_json(path), where=str(path), refuse=DataError)


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder, or where it has none itself, of those in it, in order.

    Raises:
        DataError: When there are none, or they are of tokens.
    """
    if all((folder / name).exists() for name in _OF_TOKENS):
        raise DataError(f"{folder}: holds token shards, and images are wanted; name the raw shards they were made of")
    names = in_order(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    if not names:
        endings = ", ".join(f"*{ending}" for ending in SHARD_ENDINGS)
        raise DataError(f"{folder}: no raw shards ({endings}); run `tokscale prepare` first, or name another data_dir")
    return [folder / name for name in names]


def in_order(names: Iterable[str]) -> list[str]:
    """Names of shards, `2.tar` before `10.tar`, without hidden ones: folder by folder, where none lies on top."""
    kept = [name.rpartition("/") for name in names if name.endswith(SHARD_ENDINGS) and not is_hidden(name)]
    kept = [parts for parts in kept if not parts[0]] or kept
    return ["".join(parts) for parts in sorted(kept, key=lambda parts: (parts[0], len(parts[2]), parts[2]))]


@dataclass(frozen=True)
class RawRecord:
    """One sample on its way into a shard."""

    key: str
    image: bytes
    ending: str
    caption: str
    meta: Mapping[str, Any] | None = None
    captions: Sequence[str] = ()
    """All of them, where there are several."""
    label: int | None = None
    """Its class, where there are classes."""


def write_shard(path: Path, records: Iterable[RawRecord]) -> int:
    """Write a shard, whole or not at all; the same records give the same bytes. Returns the number of samples.

    Raises:
        StorageError: When the file system refuses.
    """
    from webdataset.writer import TarWriter  # slow to import, and readers need none of it

    count = 0
    # A float modification time, the default, would cost a kilobyte a member and differ in every run.
    with atomic_write(path) as file, TarWriter(cast(BinaryIO, file), encoder=False, mtime=0, user="", group="") as tar:
        for record in records:
            files = {record.ending: record.image}
            if record.caption:
                files["txt"] = record.caption.encode()
            if record.label is not None:
                files["cls"] = str(record.label).encode()
            if record.meta is not None:
                files["json"] = json.dumps(record.meta, sort_keys=True, ensure_ascii=False).encode()
            if record.captions:
                files[CAPTIONS] = json.dumps(list(record.captions), ensure_ascii=False).encode()
            tar.write({"__key__": record.key, **files})
            count += 1
    return count


def _grouped(members: Iterable[tarfile.TarInfo]) -> list[RawSample]:
    """Files that follow each other and share a key are a sample; webdataset's own rules."""
    samples: list[RawSample] = []
    keys: set[str] = set()
    current: tuple[str, int, dict[str, Member]] | None = None

    def finish() -> None:
        if current is not None:
            key, offset, files = current
            samples.append(RawSample(key, offset, files, _flaw(key, keys)))
            keys.add(key)

    for member in members:
        folder, _, name = member.name.rpartition("/")
        stem, dot, ending = name.partition(".")
        if not member.isreg() or not dot or (name.startswith("__") and name.endswith("__")):
            continue
        key, ending = f"{folder}/{stem}" if folder else stem, ending.lower()
        if current is None or current[0] != key or ending in current[2]:
            finish()
            current = (key, member.offset, {})
        current[2][ending] = Member(member.offset_data, member.size)
    finish()
    return samples


def _flaw(key: str, before: set[str]) -> tuple[Reason, str] | None:
    try:
        key.encode()
    except UnicodeEncodeError:
        return "key_encoding", ascii(key)
    return ("duplicate_key", f"{key!r} was in this shard before") if key in before else None
