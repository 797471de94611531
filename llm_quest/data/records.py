"""Records: the rows of a JSON list, a JSON-lines file (also .gz) or a table (CSV, TSV), each with the file and line on
which it begins."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llm_quest.data.documents import (
    JSON_LINES_SUFFIXES,
    Document,
    DropReport,
    decode_utf8,
    open_maybe_gzip,
    parse_json_object,
    read_file_bytes,
    read_text,
    require_regular_file,
    text_column,
)
from llm_quest.errors import DataError

TABLE_DELIMITERS = {".csv": ",", ".tsv": "\t"}
RECORD_SUFFIXES = (*JSON_LINES_SUFFIXES, *TABLE_DELIMITERS, ".json")


class Record(NamedTuple):
    """A row of a file. where: file:line."""

    row: dict[str, Any]
    where: str


def read_records(file: str | Path) -> list[Record]:
    """All rows of a file. DataError with file and line for a file of another kind."""
    file = require_regular_file(Path(file))
    name = file.name.lower()
    if name.endswith(JSON_LINES_SUFFIXES):
        found = list(iter_json_lines(file))
    elif file.suffix.lower() in TABLE_DELIMITERS:
        found = list(iter_table(file, TABLE_DELIMITERS[file.suffix.lower()]))
    elif file.suffix.lower() == ".json":
        found = list(iter_json_list(file))
    else:
        raise DataError(f"{file} ends in {file.suffix or 'nothing'}; rows are read from .json, .jsonl, .csv and .tsv")
    if not found:
        raise DataError(f"{file} holds no rows")
    for record in found:
        require_valid_text(record.row, record.where)
    return found


def require_valid_text(value: Any, where: str) -> None:
    """DataError for half of a surrogate pair in any text of a row (a JSON escape of an emoji that was cut off)."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise DataError(f"{where}: {half!r} is half of a surrogate pair alone, and no text; remove it") from None
    elif isinstance(value, dict | list):
        for one in (*value, *value.values()) if isinstance(value, dict) else value:
            require_valid_text(one, where)


def iter_json_lines(file: Path) -> Iterator[Record]:
    with open_maybe_gzip(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Record(parse_json_object(line, file, number), f"{file}:{number}")


def iter_json_list(file: Path) -> Iterator[Record]:
    """The objects of a JSON list one by one, each with its line."""
    text, decoder = decode_utf8(read_file_bytes(file), file), json.JSONDecoder()
    at = skip_whitespace(text, 0)
    if text[at : at + 1] != "[":
        raise DataError(f"{file} does not begin with '[': expected a list of objects, or JSON lines in a .jsonl file")
    at, line, counted = skip_whitespace(text, at + 1), 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{file}:{line} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{file}:{line} holds a {type(row).__name__}, expected an object")
        yield Record(row, f"{file}:{line}")
        at = skip_whitespace(text, end)
        if text[at : at + 1] == ",":
            at = skip_whitespace(text, at + 1)
        elif text[at : at + 1] != "]":
            raise DataError(f"{file}:{line}: after this object a ',' or the closing ']' is missing")


def skip_whitespace(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def iter_table(file: Path, delimiter: str) -> Iterator[Record]:
    """The rows of a table, whose first row names the columns."""
    reader = csv.DictReader(
        io.StringIO(decode_utf8(read_file_bytes(file), file), newline=""), delimiter=delimiter, strict=True
    )
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{file}:{reader.line_num} has another number of cells than the first line names "
                    f"({len(reader.fieldnames or ())}); quote cells that hold {delimiter!r}"
                )
            yield Record(dict(row), f"{file}:{reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num} is not a table ({error})") from None


def read_prompts(file: str | Path, column: str = "prompt") -> list[Document]:
    """The prompts in the file's order. Of JSON lines, a JSON list or a table: the column, which may be empty (a text
    from its very beginning). Of any other file: its lines, without blank ones."""
    file = Path(file)
    if file.name.lower().endswith(RECORD_SUFFIXES):
        rows = read_records(file)
        return [Document(text_column(one.row, column, one.where), one.where) for one in rows]
    found = list(read_text(file, DropReport(), separator="\n"))
    if not found:
        raise DataError(f"{file} holds no prompts: write one a line, or rows with {column!r} in a .jsonl file")
    return [Document(one.text, f"{one.source}:{one.line}", one.line) for one in found]
