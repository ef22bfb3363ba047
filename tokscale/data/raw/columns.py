"""Tables of images and captions in parquet files, and in folders that the `datasets` library saved; rows on demand."""

import hashlib
import json
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from tokscale.base.errors import DataError, EnvironmentRefused
from tokscale.base.files import read_json
from tokscale.data.raw.tables import Row

_GROUPS = 4
"""Row groups that stay in memory; with images inside, one may have hundreds of megabytes."""
_FOOTER = 1 << 16
_SPLIT, _SPLITS = re.compile(r"(\w+)-\d{5}-of-\d{5}\.parquet"), {"train", "test", "validation", "valid", "val", "dev"}


class ColumnTable:
    """Rows of one or several files of columns as one sequence, read group by group. Safe from many threads."""

    def __init__(self, files: Sequence[Path]):
        """Open the files; nothing but their footers is read.

        Raises:
            EnvironmentRefused: When pyarrow is not installed.
            DataError: When one is missing, damaged, or has other columns than the first.
        """
        self.files = tuple(files)
        self._parts = [_Part(path) for path in self.files]
        first = self._parts[0].schema
        for part in self._parts:
            if part.schema.names != first.names or part.schema.types != first.types:
                raise DataError(f"{part.path}: has other columns than {self.files[0]}; prepare it on its own")
        self.columns: list[str] = list(first.names)
        self._schema = first
        self._groups = [(part, number) for part in self._parts for number in range(part.groups)]
        sizes = [part.rows_of(number) for part, number in self._groups]
        self._starts = list(accumulate(sizes, initial=0))
        self._held: OrderedDict[tuple[int, tuple[str, ...]], Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def type_of(self, column: str) -> str:
        """A column's type in words, such as `string` or `list<item: string>`."""
        return str(self._schema.field(column).type)

    def class_names(self, column: str) -> list[str] | None:
        """Names of a column's classes, as the `datasets` library writes them into a schema."""
        try:
            features = json.loads((self._schema.metadata or {})[b"huggingface"])["info"]["features"]
            names = features[column]["names"]
        except (KeyError, TypeError, ValueError):
            return None
        return [str(name) for name in names] if isinstance(names, list) else None

    def row(self, index: int, columns: Sequence[str]) -> Row:
        """Row `index`, of these columns.

        Raises:
            DataError: When its part of the file is damaged.
        """
        group = bisect_right(self._starts, index) - 1
        table = self._read(group, tuple(columns))
        at = index - self._starts[group]
        return Row(index + 1, {name: table.column(name)[at].as_py() for name in columns})

    def identity(self) -> str:
        """A hash of names, sizes and footers, which tell where every column lies and how large it is."""
        digest = hashlib.sha256()
        for path in self.files:
            size = path.stat().st_size
            with open(path, "rb") as file:
                file.seek(max(size - _FOOTER, 0))
                digest.update(json.dumps([path.name, size]).encode() + file.read())
        return digest.hexdigest()

    def _read(self, group: int, columns: tuple[str, ...]) -> Any:
        with self._lock:
            if (group, columns) not in self._held:
                part, number = self._groups[group]
                self._held[group, columns] = part.read(number, columns)
                if len(self._held) > _GROUPS:
                    self._held.popitem(last=False)
            self._held.move_to_end((group, columns))
            return self._held[group, columns]


class _Part:
    """One file: parquet, or an Arrow stream of `datasets`."""

    def __init__(self, path: Path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise EnvironmentRefused("reading parquet needs pyarrow: pip install 'tokscale[parquet]'") from None
        self.path, self._errors = path, (pyarrow.ArrowException, OSError)
        if not path.is_file():
            raise DataError(f"{path}: no such table; set source.path")
        try:
            if path.suffix == ".arrow":
                self._table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
                self._file, self.schema, self.groups = None, self._table.schema, 1
            else:
                self._file = pyarrow.parquet.ParquetFile(path)
                self.schema, self.groups = self._file.schema_arrow, self._file.num_row_groups
        except self._errors as error:
            raise DataError(f"{path}: not a parquet file, or damaged ({error})") from None

    def rows_of(self, group: int) -> int:
        return self._table.num_rows if self._file is None else self._file.metadata.row_group(group).num_rows

    def read(self, group: int, columns: Sequence[str]) -> Any:
        try:
            if self._file is None:
                return self._table.select(list(columns))
            return self._file.read_row_group(group, columns=list(columns), use_threads=False)
        except self._errors as error:
            raise DataError(f"{self.path}: row group {group} is damaged ({error}); fetch the file again") from None


METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Tables beside the images of a folder of the `datasets` library."""


def chosen_split(folder: Path) -> Path:
    """The folder of a folder's only split: itself, unless what describes the images lies in folders below.

    Raises:
        DataError: When there are several.
    """
    if any((folder / name).is_file() for name in METADATA):
        return folder
    splits = sorted({path.parent for name in METADATA for path in folder.glob(f"*/{name}")})
    if len(splits) > 1:
        raise _several(folder, [path.name for path in splits])
    return splits[0] if splits else folder


def files_of_split(folder: Path, files: Sequence[Path]) -> list[Path]:
    """The parquet files of a folder, as they are named by the `datasets` library: `train-00000-of-00002.parquet`.

    Raises:
        DataError: When they are of several splits, or in folders that are called like such.
    """
    named = {_SPLIT.match(path.name) for path in files}
    found = {match[1] for match in named if match} if None not in named else set()
    found = found or {path.relative_to(folder).parts[0] for path in files} & _SPLITS
    if len(found) > 1:
        raise DataError(
            f"{folder}: holds the splits {', '.join(sorted(found))}; give one a folder of its own (links will do) and "
            "name that: source.path=FOLDER"
        )
    return list(files)


def _several(folder: Path, splits: Sequence[str]) -> DataError:
    return DataError(f"{folder}: holds the splits {', '.join(splits)}; name one: source.path={folder / splits[0]}")


def saved_files(folder: Path) -> list[Path] | None:
    """The files of a folder that `datasets.save_to_disk` wrote, None when it is none.

    Raises:
        DataError: When it holds several splits, or a selection of rows only.
    """
    if (folder / "dataset_dict.json").is_file():
        raise _several(folder, read_json(folder / "dataset_dict.json").get("splits", []))
    state = folder / "state.json"
    if not state.is_file() or not (folder / "dataset_info.json").is_file():
        return None
    values = read_json(state)
    if values.get("_indices_files"):
        raise DataError(
            f"{folder}: is a selection of rows; write it whole by `dataset.flatten_indices()` and save again"
        )
    return [folder / entry["filename"] for entry in values.get("_data_files", [])]
