"""Prompts from files: a line each, or a column of a table."""

import re
from pathlib import Path

from tokscale.base.config import did_you_mean
from tokscale.base.errors import DataError
from tokscale.base.files import read_regular
from tokscale.base.text import is_blank, lines_of
from tokscale.data.raw.columns import ColumnTable
from tokscale.data.raw.files import Table
from tokscale.data.raw.tables import TextTable, read_delimited, read_json_lines

_COLUMNS = ("prompt", "caption", "text", "Prompt", "TEXT")


def read_prompts(path: Path, column: str | None = None) -> list[str]:
    """The prompts of a file, in its order.

    Args:
        path: Ending in `.csv`, `.tsv`, `.jsonl` or `.parquet` a table, else a text with one prompt a line.
        column: Of a table; by default the first that is called `prompt`, `caption` or `text`.

    Raises:
        DataError: When it cannot be read, has no such column, or a row has no prompt; names the row.
        EnvironmentRefused: When pyarrow is not installed.
    """
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv", ".jsonl", ".parquet"):
        return _of_table(path, _table(path, kind), column)
    if column is not None:
        raise DataError(f"prompts_file: {path} is no table (.csv, .tsv, .jsonl, .parquet); leave prompts_column out")
    try:
        return [line for line in lines_of(read_regular(path).decode("utf-8-sig")) if not is_blank(line)]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts_file: cannot read {path} as UTF-8 text ({error})") from None


def _table(path: Path, kind: str) -> Table:
    match kind:
        case ".parquet":
            return ColumnTable([path])
        case ".jsonl":
            return TextTable(path, *read_json_lines(path, []))
        case _:
            try:
                columns, rows = read_delimited(
                    path,
                    delimiter="\t" if kind == ".tsv" else ",",
                    quoting="standard",
                    encoding="utf-8",
                    is_path=lambda text: False,
                    path_column="",
                )
            except DataError as error:
                raise DataError(f"prompts_file: {_as_prompts(str(error))}") from None
            return TextTable(path, columns, rows)


def _as_prompts(words: str) -> str:
    """What is wrong with a table, for one whose form no key changes: without the advice to set those of `prepare`."""
    kept = re.sub(r";? ?\(?(?:give (?:its own by )?)?source\.[a-z_]+=[^);]*\)?", "", words)
    return (
        f"{kept}; a table of prompts is text in UTF-8, commas (.csv) or tabs (.tsv) between its fields, quotes in pairs"
    )


def _of_table(path: Path, table: Table, column: str | None) -> list[str]:
    chosen = column or next((name for name in _COLUMNS if name in table.columns), None)
    if chosen is None or chosen not in table.columns:
        advice = (
            did_you_mean(column, table.columns)
            if column
            else f"; give prompts_column=NAME, one of {', '.join(map(str, table.columns))}"
        )
        raise DataError(f"prompts_file: {path} has no column {column or 'prompt'!r}{advice}")
    found = []
    for index in range(len(table)):
        row = table.row(index, [chosen])
        value = row.values.get(chosen)
        if row.flaw is not None:
            raise DataError(f"prompts_file: {path}: row {row.number} {_as_prompts(row.flaw)}")
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # a class
        if not isinstance(value, str) or is_blank(value):
            raise DataError(f"prompts_file: {path}: row {row.number} has {value!r:.60} for a prompt; give text")
        found.append(value.strip())
    return found
