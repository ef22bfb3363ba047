"""Images that people have: in folders, in tables of paths, inside of tables. One sample at a time, each with a name."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tokscale.base.config import fingerprint
from tokscale.base.errors import DataError
from tokscale.base.files import open_regular
from tokscale.base.log import logger
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.raw.captions import caption_text, json_captions, texts_of, written_captions
from tokscale.data.raw.folders import Listing, class_of
from tokscale.data.raw.images import decode_image, encode_image
from tokscale.data.raw.shards import RawRecord
from tokscale.data.raw.tables import Row

_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}
log = logger("prepare")


@dataclass(frozen=True)
class Wishes:
    """What is to be made of images and captions, whatever they are in."""

    keep_corrupt: bool = False
    captions: str = "required"
    """`required`, `optional` or `none`."""
    template: str | None = None
    caption_field: str = "caption"
    """Of captions in JSON files."""
    all_captions: bool = False
    """Take every caption file of an image, not the first alone."""


@dataclass(frozen=True)
class Found:
    """A sample where it lies."""

    name: str
    """For people: a path, or the number of a row."""
    image: Path | bytes | None
    captions: Sequence[str] | Sequence[Path] = ()
    label: int | None = None
    meta: Mapping[str, Any] | None = None


class FileSource:
    """Images in files. What is not JPEG, PNG or WebP is stored as PNG, everything else byte for byte."""

    def __init__(
        self,
        found: Callable[[int], Found],
        count: int,
        *,
        root: Path,
        name: Callable[[int], str],
        identity: Callable[[], Any],
        wishes: Wishes = Wishes(),
        classes: Sequence[str] | None = None,
    ):
        """Describe what there is.

        Args:
            found: Gives sample number n.
            count: How many there are.
            root: What relative paths start from.
            name: Says where sample number n comes from, for people.
            identity: Plain values that decide the samples beside the source's configuration.
            wishes: What is to be made of them.
            classes: Names of the labels, where there are any.
        """
        self._found, self._count, self._name, self._identity = found, count, name, identity
        self.root, self.wishes, self.classes = root, wishes, classes
        self.has_captions = wishes.captions == "required"

    def __len__(self) -> int:
        return self._count

    def identity(self) -> Any:
        """Hash of the table; of names and sizes for a folder, which is enough to notice what came, went or changed."""
        return self._identity()

    def name(self, index: int) -> str:
        """Where sample `index` comes from, for people."""
        return self._name(index)

    def record(self, index: int) -> RawRecord:
        """One sample, its image decoded once to see that it can be.

        Raises:
            BadSample: When it cannot be used.
        """
        found = self._found(index)
        if found.image is None:
            raise BadSample("image_missing", f"nothing to {found.name}")
        if self.classes is not None and found.label is None:
            raise BadSample("label", f"{found.name} lies in no class folder")
        captions = self._captions(found)
        data = found.image if isinstance(found.image, bytes) else read_file(self.root, found.image)
        damage: list[str] = []
        pixels = decode_image(data, on_corrupt=damage.append if self.wishes.keep_corrupt else None)
        ending = _ending(data)
        if ending is None:
            data, ending = encode_image(pixels, "png"), "png"
        meta = {"path": str(found.image)} if isinstance(found.image, Path) else {"row": found.name}
        text = "\n".join(captions)
        several = captions if len(captions) > 1 else ()
        return RawRecord(f"{index:09d}", data, ending, text, meta, several, found.label)

    def _captions(self, found: Found) -> tuple[str, ...]:
        if self.wishes.captions == "none":
            return self._filled((), found)
        try:
            written = written_captions(self._texts(found), found.name)
        except BadSample as error:
            if self.wishes.captions == "required" and self._needs_text():
                raise
            if error.reason not in ("caption_missing", "caption_empty"):
                raise
            written = ()
        return self._filled(written, found)

    def _needs_text(self) -> bool:
        return self.wishes.template is None or "{caption}" in self.wishes.template

    def _texts(self, found: Found) -> tuple[str, ...]:
        """What stands there, blank captions as empty texts."""
        files = [caption for caption in found.captions if isinstance(caption, Path)]
        if not files:
            return tuple(str(caption) for caption in found.captions)
        chosen = files if self.wishes.all_captions else files[:1]
        return tuple(text for path in chosen for text in self._in_file(path))

    def _in_file(self, path: Path) -> tuple[str, ...]:
        data = read_file(self.root, path)
        if path.suffix.lower() == ".json":
            return json_captions(data, self.wishes.caption_field, str(path))
        return (caption_text(data),)

    def _filled(self, captions: tuple[str, ...], found: Found) -> tuple[str, ...]:
        template = self.wishes.template
        if template is None:
            return captions
        if "{class}" in template:
            if found.label is None or self.classes is None:
                raise BadSample("label", f"no class for {template!r}")
            template = template.replace("{class}", self.classes[found.label])
        if "{caption}" not in template:
            return (template,)
        return tuple(template.replace("{caption}", caption) for caption in captions)


def read_file(root: Path, path: Path) -> bytes:
    """The bytes of a file; never waits for a pipe.

    Raises:
        BadSample: When there is none that can be read.
    """
    try:
        with open(open_regular(root / path), "rb") as file:
            return file.read()
    except DataError as error:
        raise BadSample("unreadable", str(error)) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise BadSample("unreadable", f"{path}: {getattr(error, 'strerror', None) or error}") from None


def folder_source(root: Path, listing: Listing, wishes: Wishes, *, labels: bool) -> FileSource:
    """The images of a folder, with captions beside them and classes by subfolder.

    Raises:
        DataError: When there is none.
    """
    if listing.links:
        log.warning(
            "%s: %d linked folders were not entered (%s); source.follow_links=true enters them",
            root,
            len(listing.links),
            ", ".join(map(str, listing.links[:3])),
        )
    found: list[Found] = []
    names = sorted({name for path in listing.images if (name := class_of(path)) is not None}) if labels else None
    for path in listing.images:
        label = names.index(folder) if names and (folder := class_of(path)) is not None else None
        found.append(Found(str(path), path, listing.captions.get(listing.keys[path], ()), label))
    keys = set(listing.keys.values())
    alone = sorted(path for key, paths in listing.captions.items() if key not in keys for path in paths)
    if wishes.captions != "none":
        found += [Found(str(path), None) for path in alone if path.suffix.lower() != ".json"]
    if not listing.images:
        raise DataError(f"{root}: no images found, nothing to prepare")

    def identity() -> Any:
        digest = hashlib.sha256()
        for entry in found:
            paths = [path for path in (entry.image, *entry.captions) if isinstance(path, Path)]
            paths = paths or [Path(entry.name)]
            digest.update(fingerprint([[str(path), _size(root / path)] for path in paths]).encode())
        return {"files": digest.hexdigest()}

    if labels and wishes.captions == "required":
        wishes = replace(wishes, captions="optional")
    return FileSource(
        found.__getitem__,
        len(found),
        root=root,
        name=lambda index: found[index].name,
        identity=identity,
        wishes=wishes,
        classes=names,
    )


class Table(Protocol):
    """Rows by number, and their columns."""

    columns: list[str]

    def __len__(self) -> int: ...

    def row(self, index: int, columns: Sequence[str]) -> Row:
        """Row `index`."""
        ...

    def type_of(self, column: str) -> str:
        """A column's type in words; empty when each value has its own."""
        ...

    def class_names(self, column: str) -> list[str] | None:
        """Names of a column's classes, when the table states them."""
        ...

    def identity(self) -> Any:
        """A hash of the content."""
        ...


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read."""

    image: str
    captions: tuple[str, ...]
    label: str | None = None
    group_by: str | None = None

    @property
    def all(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(filter(None, (self.image, *self.captions, self.label, self.group_by))))


def table_source(table: Table, columns: Columns, wishes: Wishes, root: Path) -> FileSource:
    """The images of a table: rows, or groups of rows that share an image.

    Raises:
        DataError: When there is no row.
    """
    if not len(table):
        raise DataError(f"{root}: the table has no rows, nothing to prepare")
    groups = _groups(table, columns)
    classes = _classes(table, columns.label)
    numbers = {name: number for number, name in enumerate(classes)} if classes else {}

    def one(index: int) -> Found:
        row = table.row(index, columns.all)
        name = f"row {row.number}"
        if row.flaw is not None:
            raise BadSample("bad_row", f"{name} {row.flaw}")
        image = _image(row.values[columns.image], name)
        captions = () if wishes.captions == "none" else _row_captions(row, columns.captions, name)
        label = None
        if columns.label is not None:
            stated = row.values.get(columns.label)
            label = numbers.get(stated, stated) if isinstance(stated, str) else stated
            if not isinstance(label, int) or isinstance(label, bool) or label < 0:
                raise BadSample("label", f"{name}: {stated!r} in {columns.label}; classes are numbers or names")
        return Found(name, image, captions, label)

    def found(index: int) -> Found:
        if groups is None:
            return one(index)
        rows = [one(number) for number in groups[index]]
        return replace(rows[0], captions=tuple(str(text) for row in rows for text in row.captions))

    return FileSource(
        found,
        len(groups) if groups is not None else len(table),
        root=root,
        name=lambda index: f"row {table.row(groups[index][0] if groups else index, columns.all).number}",
        identity=lambda: {"table": table.identity()},
        wishes=wishes,
        classes=classes,
    )


def _row_captions(row: Row, columns: Sequence[str], name: str) -> tuple[str, ...]:
    return tuple(text for column in columns for text in texts_of(row.values.get(column), f"{name}: {column}"))


def _image(value: Any, name: str) -> Path | bytes | None:
    if isinstance(value, dict):  # as the datasets library writes it
        value = value.get("bytes") or value.get("path")
    match value:
        case None | "" | b"":
            return None
        case str():
            return Path(value)
        case bytes():
            return value
        case _:
            raise BadSample("image_type", f"{name}: {type(value).__name__}; an image is a path, or its file's bytes")


def _groups(table: Table, columns: Columns) -> list[list[int]] | None:
    if columns.group_by is None:
        return None
    groups: dict[Any, list[int]] = {}
    for index in range(len(table)):
        row = table.row(index, [columns.group_by])
        key = None if row.flaw else row.values.get(columns.group_by)
        groups.setdefault(json.dumps(key, default=str) if key is not None else index, []).append(index)
    return list(groups.values())


def _classes(table: Table, column: str | None) -> list[str] | None:
    if column is None:
        return None
    if (stated := table.class_names(column)) is not None:
        return stated
    values = {row.values.get(column) for index in range(len(table)) if (row := table.row(index, [column])).flaw is None}
    names = sorted(value for value in values if isinstance(value, str))
    if names and all(name.isdecimal() for name in names):
        return None
    return names or None


def _ending(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((ending for magic, ending in _MAGIC.items() if data.startswith(magic)), None)


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1
