"""Where raw shards come from: the built-in data sets, a folder of pictures, a table of paths and captions."""

import csv
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from tokscale.base.config import Config, PathKey, did_you_mean, fingerprint
from tokscale.base.errors import DataError, EnvironmentRefused
from tokscale.base.files import sha256_file
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.raw.emoji import EmojiConfig, EmojiSource
from tokscale.data.raw.images import decode_picture, encode_picture
from tokscale.data.raw.shapes.source import ShapesConfig, ShapesSource
from tokscale.data.raw.shards import PICTURE_ENDINGS, RawRecord, checked_caption, is_hidden

_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}


class FolderConfig(Config):
    """A folder of pictures, each with a caption in a `.txt` file of the same name beside it; subfolders count too."""

    kind: Literal["folder"] = "folder"
    path: PathKey
    """The folder."""


class CsvConfig(Config):
    """A table in a text file, with a header line."""

    kind: Literal["csv"] = "csv"
    path: PathKey
    """The file, UTF-8."""
    path_column: str = "path"
    """Column of the pictures' paths."""
    caption_column: str = "caption"
    """Column of their captions."""
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    """Between columns."""
    root: PathKey | None = None
    """What relative picture paths start from; the table's own folder when not given."""


class ParquetConfig(Config):
    """A table in a parquet file; needs pyarrow (`pip install 'tokscale[parquet]'`)."""

    kind: Literal["parquet"] = "parquet"
    path: PathKey
    """The file."""
    path_column: str = "path"
    """Column of the pictures' paths."""
    caption_column: str = "caption"
    """Column of their captions."""
    root: PathKey | None = None
    """What relative picture paths start from; the table's own folder when not given."""


SourceConfig = Annotated[
    ShapesConfig | EmojiConfig | FolderConfig | CsvConfig | ParquetConfig, Field(discriminator="kind")
]


class Source(Protocol):
    """A finite sequence of samples that can be asked for in any order, from any thread."""

    def __len__(self) -> int: ...

    def identity(self) -> Any:
        """Plain values that decide the samples beside the source's configuration."""
        ...

    def record(self, index: int) -> RawRecord:
        """One sample.

        Raises:
            BadSample: When it cannot be used.
        """
        ...


def open_source(config: SourceConfig, seed: int) -> Source:
    """The source that a configuration names.

    Raises:
        DataError: When its folder or table is missing, empty or not as configured.
        EnvironmentRefused: When a font or a library is not installed.
    """
    match config:
        case ShapesConfig():
            return ShapesSource(config, seed)
        case EmojiConfig():
            return EmojiSource(config, seed)
        case FolderConfig():
            return FileSource(_folder_rows(config.path), config.path)
        case CsvConfig():
            rows = list(_csv_rows(config))
            return FileSource(rows, config.root or config.path.parent, table=config.path)
        case ParquetConfig():
            return FileSource(_parquet_rows(config), config.root or config.path.parent, table=config.path)


class FileSource:
    """Pictures in files. What is not JPEG, PNG or WebP is stored as PNG, everything else byte for byte."""

    def __init__(self, rows: Sequence[tuple[Path | None, Path | str | None]], root: Path, table: Path | None = None):
        """List what there is.

        Args:
            rows: Path of a picture, and its caption or the path of a file with it; None for what is missing.
            root: What relative paths start from.
            table: The file that the rows were read from.

        Raises:
            DataError: When there is nothing.
        """
        if not rows:
            raise DataError(f"{table or root}: no pictures found ({', '.join(PICTURE_ENDINGS)}), nothing to prepare")
        self.rows, self.root, self.table = rows, root, table

    def __len__(self) -> int:
        return len(self.rows)

    def identity(self) -> Any:
        """Hash of the table; of names and sizes for a folder, which is enough to notice what came, went or changed."""
        if self.table is not None:
            return {"table": sha256_file(self.table)}
        digest = hashlib.sha256()
        for paths in self.rows:
            sizes = [[str(path), os.stat(self.root / path).st_size] for path in paths if path is not None]
            digest.update(fingerprint(sizes).encode())
        return {"files": digest.hexdigest()}

    def record(self, index: int) -> RawRecord:
        """One sample, its picture decoded once to see that it can be.

        Raises:
            BadSample: When it cannot be used.
        """
        path, caption = self.rows[index]
        if path is None:
            raise BadSample("picture_missing", f"nothing to {caption}")
        if caption is None:
            raise BadSample("caption_missing", f"nothing to {path}")
        text = checked_caption(self._read(caption) if isinstance(caption, Path) else caption.encode())
        data = self._read(path)
        pixels = decode_picture(data)
        ending = _ending(data)
        if ending is None:
            data, ending = encode_picture(pixels, "png"), "png"
        return RawRecord(f"{index:09d}", data, ending, text, {"path": str(path)})

    def _read(self, path: Path) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except OSError as error:
            raise BadSample("unreadable", f"{path}: {error.strerror}") from None


def _ending(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((ending for magic, ending in _MAGIC.items() if data.startswith(magic)), None)


def _folder_rows(root: Path) -> list[tuple[Path | None, Path | None]]:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set source.path to a folder of pictures and .txt files")
    pictures, captions = [], set()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        for name in sorted(names):
            path = Path(folder, name).relative_to(root)
            ending = path.suffix.lower().removeprefix(".")
            if is_hidden(name):
                continue
            if ending in PICTURE_ENDINGS:
                pictures.append(path)
            elif ending == "txt":
                captions.add(path.with_suffix(""))
    # Keyed by the whole path: pictures of one name in two folders are two samples.
    rows: list[tuple[Path | None, Path | None]] = [
        (path, path.with_suffix(".txt") if path.with_suffix("") in captions else None) for path in pictures
    ]
    alone = captions - {path.with_suffix("") for path in pictures}
    return rows + [(None, Path(f"{stem}.txt")) for stem in sorted(alone)]


def _csv_rows(config: CsvConfig) -> Iterator[tuple[Path | None, str | None]]:
    try:
        with open(config.path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter=config.delimiter)
            _require_columns(config, table.fieldnames or ())
            for row in table:
                yield Path(row[config.path_column]) if row[config.path_column] else None, row[config.caption_column]
    except FileNotFoundError:
        raise DataError(f"{config.path}: no such table; set source.path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{config.path}: not a table in UTF-8 ({error}); convert it first") from None


def _parquet_rows(config: ParquetConfig) -> list[tuple[Path | None, str | None]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise EnvironmentRefused("reading parquet needs pyarrow: pip install 'tokscale[parquet]'") from None
    if not config.path.is_file():
        raise DataError(f"{config.path}: no such table; set source.path")
    try:
        with parquet.ParquetFile(config.path) as file:
            _require_columns(config, file.schema_arrow.names)
            table = file.read([config.path_column, config.caption_column])
    except pyarrow.ArrowException as error:
        raise DataError(f"{config.path}: not a parquet file, or damaged ({error})") from None
    paths, captions = (table[name].to_pylist() for name in (config.path_column, config.caption_column))
    return [(Path(path) if path else None, caption) for path, caption in zip(paths, captions, strict=True)]


def _require_columns(config: CsvConfig | ParquetConfig, names: Sequence[str]) -> None:
    for key in ("path_column", "caption_column"):
        column = getattr(config, key)
        if column not in names:
            raise DataError(f"{config.path}: has no column {column!r} (source.{key}){did_you_mean(column, names)}")
