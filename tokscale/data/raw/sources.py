"""Where raw shards come from: the built-in data sets, a folder of images, a table of paths or images and captions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, assert_never

from pydantic import Field, field_validator

from tokscale.base.config import Config, PathKey, did_you_mean, encode
from tokscale.base.errors import DataError
from tokscale.base.log import logger
from tokscale.data.raw.columns import METADATA, ColumnTable, chosen_split, files_of_split, saved_files
from tokscale.data.raw.emoji import EmojiConfig, EmojiSource
from tokscale.data.raw.files import Columns, FileSource, Table, Wishes, folder_source, table_source
from tokscale.data.raw.folders import CAPTION_ENDINGS, list_folder
from tokscale.data.raw.shapes.source import ShapesConfig, ShapesSource
from tokscale.data.raw.shards import IMAGE_ENDINGS, RawRecord
from tokscale.data.raw.tables import Quoting, Row, TextTable, read_delimited, read_json_lines

_IMAGE_COLUMNS = ("path", "image", "file_name", "filename", "image_path", "jpg", "png")
_CAPTION_COLUMNS = ("caption", "text", "captions", "prompt", "TEXT")
log = logger("prepare")


class FilesConfig(Config):
    """What images and captions are made of, whatever they lie in."""

    first_keys: ClassVar[frozenset[str]]
    """Those of its first version, which always enter a fingerprint."""
    captions: Literal["required", "optional", "none"] = "required"
    """`required` leaves out images without a caption, `optional` takes them as they are, `none` reads no captions: for
    models of classes, and for those without any condition."""
    template: str | None = None
    """Text around a caption or a class: `a photo of {class}`, `{caption}, clip art`. Without `{caption}` it takes the
    place of captions."""
    keep_corrupt: bool = False
    """Keep damaged images of which a lenient decoder makes something, grey or noise in part."""

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, value: str | None) -> str | None:
        if value is not None and "{class}" not in value and "{caption}" not in value:
            raise ValueError(f"got {value!r}; it has neither {{class}} nor {{caption}} in it")
        return value

    @property
    def wishes(self) -> Wishes:
        """For the source."""
        return Wishes(keep_corrupt=self.keep_corrupt, captions=self.captions, template=self.template)


class FolderConfig(FilesConfig):
    """A folder of images, each with a caption in a file of the same name beside it; subfolders count too.

    Also a folder of the `datasets` library: images with `metadata.jsonl`, `.csv` or `.parquet`, parquet files, or what
    `save_to_disk` wrote.
    """

    first_keys = frozenset({"kind", "path"})
    kind: Literal["folder"] = "folder"
    path: PathKey
    """The folder."""
    labels: Literal["none", "folder"] = "none"
    """`folder`: an image's first subfolder is its class, as torchvision's ImageFolder has it; captions are optional."""
    image_pattern: str | None = None
    """What image files are called, such as `{key}.input.jpg`; by default every image is a sample."""
    caption_files: tuple[str, ...] = CAPTION_ENDINGS
    """Endings or patterns (`{key}.long.txt`) of caption files in any letter case, the most wanted first."""
    all_captions: bool = False
    """Take all caption files of an image, in the order of `caption_files`, as its several captions; training draws one
    of them each time, by `data.caption_weights`."""
    caption_field: str = "caption"
    """Where captions are in JSON files: a name, or several with dots between them."""
    caption_column: str | tuple[str, ...] = ()
    """Of `metadata.jsonl` and of columns of captions inside; by default the first that is called like one."""
    label_column: str | None = None
    """Of classes in the same."""
    follow_links: bool = False
    """Enter folders behind links."""

    @field_validator("image_pattern")
    @classmethod
    def _one_key(cls, value: str | None) -> str | None:
        if value is not None and (value.count("{key}") != 1 or "/" in value):
            raise ValueError(f"got {value!r}; it is a file name with {{key}} in it once, such as '{{key}}.input.jpg'")
        return value

    @property
    def wishes(self) -> Wishes:
        """For the source."""
        return Wishes(
            keep_corrupt=self.keep_corrupt,
            captions=self.captions,
            template=self.template,
            caption_field=self.caption_field,
            all_captions=self.all_captions,
        )


class TableConfig(FilesConfig):
    """What tables have in common."""

    first_keys = frozenset({"kind", "path", "path_column", "caption_column", "delimiter", "root"})
    path: PathKey
    """The file."""
    path_column: str = "path"
    """Column of the images: paths, or the images themselves."""
    caption_column: str | tuple[str, ...] = "caption"
    """Column of their captions, or several columns: then an image has several captions, of which training draws one
    each time, by `data.caption_weights`."""
    label_column: str | None = None
    """Column of their classes, numbers or names."""
    group_by: str | None = None
    """Column whose equal values make one sample of several rows, with the captions of all: the path, or an id."""
    on_bad_row: Literal["error", "drop"] = "error"
    """A row that is none of this table ends the stage, or is left out, counted and listed."""
    root: PathKey | None = None
    """What relative image paths start from; the table's own folder when not given."""


class CsvConfig(TableConfig):
    """A table in a text file, with a header line. Every row has exactly the fields of the header."""

    kind: Literal["csv"] = "csv"
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    """Between columns; `tab` for TSV."""
    quoting: Quoting = "standard"
    """`standard`: a field that begins with a quote ends with one; `none`: quotes are letters like others."""
    encoding: str = "utf-8"
    """Of the text; a byte order mark is no part of it."""

    @field_validator("delimiter", mode="before")
    @classmethod
    def _tab(cls, value: Any) -> Any:
        return "\t" if value in ("tab", "\\t") else value


class JsonLinesConfig(TableConfig):
    """A table in a text file with one JSON object a line."""

    kind: Literal["jsonl"] = "jsonl"


class ParquetConfig(TableConfig):
    """A table in a parquet file or in a folder of such; needs pyarrow (`pip install 'tokscale[parquet]'`)."""

    kind: Literal["parquet"] = "parquet"


SourceConfig = Annotated[
    ShapesConfig | EmojiConfig | FolderConfig | CsvConfig | JsonLinesConfig | ParquetConfig, Field(discriminator="kind")
]


def described(config: SourceConfig) -> dict[str, Any]:
    """A source's configuration as it enters a fingerprint: keys that came later are absent at their defaults."""
    values = encode(config)
    if not isinstance(config, FilesConfig):
        return values
    later = type(config).model_fields.keys() - config.first_keys
    return {
        name: value
        for name, value in values.items()
        if name not in later or getattr(config, name) != type(config).model_fields[name].default
    }


class Source(Protocol):
    """A finite sequence of samples that can be asked for in any order, from any thread."""

    @property
    def classes(self) -> Sequence[str] | None:
        """Names of the samples' labels, where there are any."""
        ...

    @property
    def has_captions(self) -> bool:
        """Whether every sample has a caption."""
        ...

    def __len__(self) -> int: ...

    def identity(self) -> Any:
        """Plain values that decide the samples beside the source's configuration."""
        ...

    def name(self, index: int) -> str:
        """Where a sample comes from, for people."""
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
            return _folder(config)
        case CsvConfig():
            return _from_table(config, _csv_table(config))
        case JsonLinesConfig():
            _require_file(config.path)
            wanted = [config.path_column] if config.path_column != "path" else []
            return _from_table(config, _checked(config, *read_json_lines(config.path, wanted)))
        case ParquetConfig():
            files = _parts(config.path) if config.path.is_dir() else [config.path]
            return _from_table(config, ColumnTable(files), config.path if config.path.is_dir() else None)
        case _:
            assert_never(config)


def _folder(config: FolderConfig) -> FileSource:
    root = config.path
    if (inside := _table_inside(config)) is not None:
        return inside
    listing = list_folder(
        root,
        image_pattern=config.image_pattern,
        caption_files=config.caption_files,
        follow_links=config.follow_links,
    )
    if not listing.images and (files := sorted(root.rglob("[!.]*.parquet"))):
        return _from_table(_as_table(config, root, "parquet"), ColumnTable(files_of_split(root, files)), root)
    return folder_source(root, listing, config.wishes, labels=config.labels == "folder")


def _table_inside(config: FolderConfig) -> FileSource | None:
    """A folder of the `datasets` library, if it is one."""
    root = config.path
    if (saved := saved_files(root)) is not None:
        return _from_table(_as_table(config, root, "parquet"), ColumnTable(saved), root)
    root = chosen_split(root)
    for name in METADATA:
        path = root / name
        if path.is_file():
            log.info("%s: images and captions as %s says", root, path.name)
            return open_source(_as_table(config, path, path.suffix[1:]), 0)  # type: ignore[return-value]
    return None


def _as_table(config: FolderConfig, path: Path, kind: str) -> Any:
    values: dict[str, Any] = {"path": path, "label_column": config.label_column}
    values |= {name: getattr(config, name) for name in ("captions", "template", "keep_corrupt")}
    if config.caption_column:
        values["caption_column"] = config.caption_column
    return {"jsonl": JsonLinesConfig, "csv": CsvConfig, "parquet": ParquetConfig}[kind](**values)


def _parts(folder: Path) -> list[Path]:
    saved = saved_files(folder)
    files = saved if saved is not None else sorted(folder.rglob("[!.]*.parquet"))
    if not files:
        raise DataError(f"{folder}: no parquet files in it; set source.path")
    return files_of_split(folder, files) if saved is None else files


def _csv_table(config: CsvConfig) -> TextTable:
    _require_file(config.path)
    columns, rows = read_delimited(
        config.path,
        delimiter=config.delimiter,
        quoting=config.quoting,
        encoding=config.encoding,
        is_path=lambda text: text.lower().rpartition(".")[2] in IMAGE_ENDINGS,
        path_column=config.path_column,
    )
    return _checked(config, columns, rows)


def _checked(config: TableConfig, columns: list[str], rows: Sequence[Row]) -> TextTable:
    flawed = [row for row in rows if row.flaw is not None]
    if flawed and config.on_bad_row == "error":
        more = f"; {len(flawed) - 1} more rows are none of this table" if len(flawed) > 1 else ""
        raise DataError(
            f"{config.path}: row {flawed[0].number} {flawed[0].flaw}{more}; mend it, or leave such rows out, counted "
            "and listed, by source.on_bad_row=drop"
        )
    return TextTable(config.path, columns, rows)


def _from_table(config: TableConfig, table: Table, folder: Path | None = None) -> FileSource:
    columns = _columns(config, table)
    wishes = config.wishes
    if not columns.captions or (columns.label is not None and wishes.captions == "required"):
        wishes = Wishes(wishes.keep_corrupt, "optional" if columns.captions else "none", wishes.template)
    return table_source(table, columns, wishes, config.root or folder or config.path.parent)


def _columns(config: TableConfig, table: Table) -> Columns:
    image = _column(config, table, "path_column", config.path_column, "path", _IMAGE_COLUMNS)
    named = (config.caption_column,) if isinstance(config.caption_column, str) else config.caption_column
    captions: tuple[str, ...] = ()
    if config.captions != "none" and not _made_of_classes(config):
        optional = config.captions == "optional" or config.label_column is not None
        if not optional or named != ("caption",) or any(name in table.columns for name in _CAPTION_COLUMNS):
            captions = tuple(
                _column(config, table, "caption_column", name, "caption", _CAPTION_COLUMNS) for name in named
            )
    for column in captions:
        kind = table.type_of(column)
        if kind and not any(word in kind for word in ("string", "binary", "null", "dictionary")):
            raise DataError(
                f"{config.path}: the column {column!r} holds {kind}; captions are texts or lists of texts, name their "
                "column by source.caption_column"
            )
    kind = table.type_of(image)
    if kind and not any(word in kind for word in ("string", "binary", "struct", "dictionary")):
        raise DataError(
            f"{config.path}: the column {image!r} holds {kind}; images are paths or their files' bytes, name their "
            "column by source.path_column"
        )
    for key in ("label_column", "group_by"):
        if (name := getattr(config, key)) is not None:
            _column(config, table, key, name, None, ())
    return Columns(image, captions, config.label_column, config.group_by)


def _made_of_classes(config: TableConfig) -> bool:
    return config.template is not None and "{caption}" not in config.template


def _column(config: TableConfig, table: Table, key: str, name: str, default: str | None, others: Sequence[str]) -> str:
    """A column by its name, or by another that is usual where no name was given."""
    if name in table.columns:
        return name
    if name == default and (found := next((other for other in others if other in table.columns), None)):
        log.info("%s: source.%s is %r", config.path, key, found)
        return found
    hint = did_you_mean(name, table.columns)
    if len(table.columns) == 1 and "delimiter" in type(config).model_fields:
        inside = next((sign for sign in ",;\t|" if sign in table.columns[0]), None)
        if inside is not None:
            hint = f", only {table.columns[0]!r}; give source.delimiter={'tab' if inside == chr(9) else repr(inside)}"
    raise DataError(f"{config.path}: has no column {name!r} (source.{key}){hint}")


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: is a folder, not a table; set source.path")
    if not path.exists():
        raise DataError(f"{path}: no such table; set source.path")
