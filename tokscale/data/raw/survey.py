"""A look at what somebody has: what kind of data set it is, how many images of which sizes, how long the captions are.

Some samples, spread over the whole, stand for all.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokscale.base.config import decode
from tokscale.base.errors import DataError
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.raw.columns import METADATA, chosen_split
from tokscale.data.raw.files import FileSource
from tokscale.data.raw.folders import CAPTION_ENDINGS, class_of, list_folder
from tokscale.data.raw.images import decode_image
from tokscale.data.raw.shards import RawDataset, in_order
from tokscale.data.raw.sources import CsvConfig, FolderConfig, JsonLinesConfig, ParquetConfig, open_source

LOOKS = 256
"""Samples that are looked at."""
_TABLES = {".csv": CsvConfig, ".tsv": CsvConfig, ".jsonl": JsonLinesConfig, ".parquet": ParquetConfig}
_NONE, _SOME = 0.02, 0.9
"""Below and above these shares of images with a caption, captions are none and required."""


@dataclass
class Survey:
    """What was seen."""

    source: dict[str, Any] | None
    """For `prepare`; None for tars, which are read as they are."""
    images: int = 0
    """Samples there are, unusable ones counted."""
    looked: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Height and width of each image that was looked at."""
    captions: list[str] = field(default_factory=list)
    """Those of the images that were looked at."""
    captioned: int = 0
    """Images with a caption, of those that were looked at."""
    classes: tuple[str, ...] | None = None
    unusable: Counter[str] = field(default_factory=Counter)
    """By reason, of those that were looked at."""


def survey(path: Path) -> Survey:
    """Look at a folder of images, of class folders or of tars, at a folder of the `datasets` library, or at a table.

    Raises:
        DataError: When there is nothing of the kind, or no image that can be read.
    """
    if not path.exists():
        raise DataError(f"{path}: no such folder or table; name what holds your images")
    tars = path.is_dir() and bool(in_order(file.relative_to(path).as_posix() for file in path.glob("**/*.t*")))
    found = _of_tars(path) if tars else _of_files(path)
    if not found.sizes:
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.unusable.items())
        raise DataError(f"{path}: none of {found.looked} samples can be used ({reasons})")
    return found


def _of_files(path: Path) -> Survey:
    values = _source(path)
    kind = FolderConfig if path.is_dir() else _TABLES[path.suffix.lower()]
    # Whatever lacks a caption is counted here, and decides below what `prepare` is told.
    opened = open_source(decode(kind, {"captions": "optional", **values}), 0)
    assert isinstance(opened, FileSource)
    found = Survey(values, images=len(opened), classes=tuple(opened.classes) if opened.classes else None)
    for index in _spread(len(opened)):
        found.looked += 1
        try:
            record = opened.record(index)
        except BadSample as error:
            found.unusable[error.reason] += 1
            continue
        found.sizes.append(_size(record.image))
        captions = list(record.captions) or ([record.caption] if record.caption else [])
        found.captioned += bool(captions)
        found.captions += captions
    share = found.captioned / max(len(found.sizes), 1)
    if found.classes is None and share < _SOME and found.sizes:
        values["captions"] = "none" if share < _NONE else "required"
    return found


def _source(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        suffix = path.suffix.lower()
        if suffix not in _TABLES:
            raise DataError(f"{path}: neither a folder nor a table ({', '.join(_TABLES)})")
        values: dict[str, Any] = {"kind": _TABLES[suffix].model_fields["kind"].default, "path": str(path.resolve())}
        return values | ({"delimiter": "tab"} if suffix == ".tsv" else {})
    described = any((chosen_split(path) / name).is_file() for name in METADATA)
    listing = list_folder(path, image_pattern=None, caption_files=CAPTION_ENDINGS, follow_links=False)
    folders = Counter(class_of(image) for image in listing.images)
    loose, captioned = folders.pop(None, 0), sum(bool(listing.captions.get(listing.keys[i])) for i in listing.images)
    values = {"kind": "folder", "path": str(path.resolve())}
    if not described and len(folders) > 1 and not loose and captioned < _SOME * len(listing.images):
        values["labels"] = "folder"
    return values


def _of_tars(path: Path) -> Survey:
    dataset = RawDataset(path)
    found = Survey(None, images=len(dataset))
    for index in _spread(len(dataset)):
        found.looked += 1
        shard, sample = dataset.sample(index)
        try:
            found.sizes.append(_size(shard.image(sample)))
            captions = shard.captions(sample)
            found.captioned += bool(captions)
            found.captions += captions
        except BadSample as error:
            found.unusable[error.reason] += 1
    return found


def _spread(count: int) -> list[int]:
    looks = min(LOOKS, count)
    return [number * count // looks for number in range(looks)]


def _size(data: bytes) -> tuple[int, int]:
    _, height, width = decode_image(data, on_corrupt=lambda damage: None).shape
    return height, width
