"""Tables of images and captions in text files, read strictly: a row is what its maker wrote, or it is bad.

The csv module alone takes an unbalanced quote for the begin of a field that ends at the next quote, however many rows
later, and gives a row of too few fields as one of None. So a row is put together here line by line: a quoted field may
run over lines, but not over one that is a row of its own.
"""

import csv
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from tokscale.base.errors import DataError
from tokscale.base.files import open_regular, sha256_file

Quoting = Literal["standard", "none"]
_LONGEST_FIELD = 16 * 2**20  # characters; the csv module's own limit, 131,072, is less than some captions have
_SNIFFED = 1 << 16
_MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    number: int
    """From 1 on, the header not counted."""
    values: Mapping[str, Any]
    """By column."""
    flaw: str | None = None
    """Why it is no row of this table."""


class TextTable:
    """Rows of a text file, all in memory."""

    def __init__(self, path: Path, columns: list[str], rows: Sequence[Row]):
        self.path, self.columns, self.rows = path, columns, rows

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int, columns: Sequence[str]) -> Row:
        """Row `index`, with all its columns."""
        return self.rows[index]

    def type_of(self, column: str) -> str:
        """Not known before a value is looked at."""
        return ""

    def class_names(self, column: str) -> list[str] | None:
        """Never stated."""
        return None

    def identity(self) -> str:
        """sha256 of the file."""
        return sha256_file(self.path)


def read_delimited(
    path: Path,
    *,
    delimiter: str,
    quoting: Quoting,
    encoding: str,
    is_path: Callable[[str], bool],
    path_column: str,
) -> tuple[list[str], list[Row]]:
    """The columns and rows of a CSV or TSV file.

    Args:
        path: The file.
        delimiter: Between fields.
        quoting: `standard`: a field that begins with a quote ends with one, and a doubled quote inside is one (RFC
            4180); `none`: quotes are letters like others, and a row is a line.
        encoding: Of the text.
        is_path: Whether a text looks like an image's path; a line with one in `path_column` is a row of its own.
        path_column: Whose fields are paths.

    Raises:
        DataError: When it is no such table as a whole.
    """
    _require_encoding(path, encoding)
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with _open_text(path, encoding) as file:
            lines = _Lines(file)
            rows = _Rows(lines, delimiter, quoting, encoding)
            header = rows.next()
            if header is None:
                raise DataError(f"{path}: is empty; a table begins with the names of its columns")
            columns, flaw = header
            if flaw is not None:
                raise DataError(
                    f"{path}: the header {flaw}; is this a table of text in {encoding}? Give source.encoding=NAME for "
                    "another, such as utf-16-le"
                )
            _require_names(path, columns)
            at = columns.index(path_column) if path_column in columns else None
            lines.is_row = lambda line: _looks_like_row(line, delimiter, len(columns), at, is_path)
            return columns, list(_numbered(rows, columns))
    except (UnicodeDecodeError, LookupError) as error:
        raise DataError(
            f"{path}: is no text in {encoding} ({error}); give its own by source.encoding=NAME, such as latin-1"
        ) from None
    finally:
        csv.field_size_limit(limit)


def read_json_lines(path: Path, columns: Sequence[str]) -> tuple[list[str], list[Row]]:
    """The columns and rows of a file with one JSON object a line.

    Args:
        path: The file.
        columns: What each row must have.

    Raises:
        DataError: When it is no such file as a whole.
    """
    names: dict[str, None] = {}
    rows: list[Row] = []
    with open(open_regular(path), "rb") as file:
        for line in file.read().removeprefix(b"\xef\xbb\xbf").split(b"\n"):
            if line.strip():
                rows.append(_json_row(len(rows) + 1, line, columns))
                names |= dict.fromkeys(rows[-1].values)
    if not rows:
        raise DataError(f'{path}: is empty; each line should be an object such as {{"file_name": "a.png"}}')
    return list(names), rows


def _json_row(number: int, line: bytes, columns: Sequence[str]) -> Row:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name comes twice")
        return found

    try:
        values = json.loads(line.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"is no JSON ({error})")
    if not isinstance(values, dict):
        return Row(number, {}, f"is {type(values).__name__}, not an object of names and values")
    missing = [name for name in columns if name not in values]
    return Row(number, values, f"has no {missing[0]!r}, only {', '.join(values) or 'nothing'}" if missing else None)


class _Glued(Exception):  # noqa: N818
    """A quoted field runs over a line that is a row of its own."""


class _Lines:
    """The lines of a table, of which some can be given back."""

    def __init__(self, file: IO[str]):
        self._file, self._again = iter(file), deque[str]()
        self.record: list[str] = []
        """Lines of the row that is being read."""
        self.is_row: Callable[[str], bool] = lambda line: False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._file)
        self.record.append(line)
        if len(self.record) > 1 and self.is_row(line):
            raise _Glued
        return line

    def give_back(self) -> None:
        """All lines of this row but its first."""
        self._again.extendleft(reversed(self.record[1:]))
        del self.record[1:]


class _Rows:
    """Fields of each row, and why they are none."""

    def __init__(self, lines: _Lines, delimiter: str, quoting: Quoting, encoding: str):
        self._lines, self._encoding = lines, encoding
        self._options: dict[str, Any] = {"delimiter": delimiter, "strict": True}
        if quoting == "none":
            self._options["quoting"] = csv.QUOTE_NONE
        self._reader = csv.reader(lines, **self._options)

    def next(self) -> tuple[list[str], str | None] | None:
        """The next row that is not blank, None at the end."""
        while True:
            self._lines.record = []
            try:
                fields = next(self._reader)
            except StopIteration:
                return None
            except (_Glued, csv.Error) as error:
                self._lines.give_back()
                self._reader = csv.reader(self._lines, **self._options)
                return [], self._why(error)
            if fields:
                return fields, self._flaw()

    def _why(self, error: Exception) -> str:
        if isinstance(error, _Glued) or "unexpected end" in str(error):
            return "opens a quote that nothing closes before the next row (source.quoting=none takes quotes as letters)"
        if "field larger" in str(error):
            return f"has a field of more than {_LONGEST_FIELD} characters; is a quote open?"
        return f"is no row of a table: {error} (source.quoting=none takes quotes as letters)"

    def _flaw(self) -> str | None:
        text = "".join(self._lines.record)
        if "\0" in text:
            return "holds a zero byte"
        if any("\udc80" <= letter <= "\udcff" for letter in text):
            return f"is not text in {self._encoding} (source.encoding=NAME reads another, such as latin-1)"
        return None


def _numbered(rows: _Rows, columns: Sequence[str]) -> Iterator[Row]:
    number = 0
    while (found := rows.next()) is not None:
        number += 1
        fields, flaw = found
        if flaw is None and len(fields) != len(columns):
            flaw = f"has {len(fields)} fields, the header {len(columns)}"
        yield Row(number, {} if flaw else dict(zip(columns, fields, strict=True)), flaw)


def _looks_like_row(
    line: str, delimiter: str, columns: int, path_at: int | None, is_path: Callable[[str], bool]
) -> bool:
    fields = line.rstrip("\r\n").split(delimiter)
    return path_at is not None and columns > 1 and len(fields) == columns and is_path(fields[path_at].strip('"'))


def _require_names(path: Path, columns: Sequence[str]) -> None:
    twice = sorted(name for name, count in Counter(columns).items() if name and count > 1)
    if twice:
        raise DataError(f"{path}: the column {twice[0]!r} comes twice in the header; name each once")


def _require_encoding(path: Path, encoding: str) -> None:
    with open(open_regular(path), "rb") as file:
        start = file.read(4)
    found = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    if found and not encoding.lower().replace("_", "-").startswith(found):
        raise DataError(f"{path}: is text in {found}, not in {encoding}; give source.encoding={found}")


def _open_text(path: Path, encoding: str) -> IO[str]:
    utf8 = encoding.lower().replace("_", "-") in ("utf-8", "utf8")
    options: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape"} if utf8 else {"encoding": encoding}
    with open(path, newline="", **options) as file:
        start = file.read(_SNIFFED)
    # Only what ends the header ends rows: a caption may hold any other line end.
    return open(path, newline="\n" if "\n" in start or "\r" not in start else "\r", **options)
