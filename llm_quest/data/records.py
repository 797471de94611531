"""Records: the rows of a JSON list, a JSON-lines file (also .gz) or a table (CSV, TSV), each with the file and line on
which it begins."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llm_quest.data.documents import JSON_LINES, content_of, decoded, opened, record_of, regular
from llm_quest.errors import DataError

TABLES = {".csv": ",", ".tsv": "\t"}


class Record(NamedTuple):
    """where: file:line."""

    row: dict[str, Any]
    where: str


def read_records(file: str | Path) -> list[Record]:
    """All of them. DataError with file and line for what is no such file."""
    file = regular(Path(file))
    name = file.name.lower()
    if name.endswith(JSON_LINES):
        found = list(json_lines(file))
    elif file.suffix.lower() in TABLES:
        found = list(table(file, TABLES[file.suffix.lower()]))
    elif file.suffix.lower() == ".json":
        found = list(json_list(file))
    else:
        raise DataError(f"{file} ends in {file.suffix or 'nothing'}; rows are read from .json, .jsonl, .csv and .tsv")
    if not found:
        raise DataError(f"{file} holds no rows")
    return found


def json_lines(file: Path) -> Iterator[Record]:
    with opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Record(record_of(line, file, number), f"{file}:{number}")


def json_list(file: Path) -> Iterator[Record]:
    """One object after another, so that each has its line."""
    text, decoder = decoded(content_of(file), file), json.JSONDecoder()
    at = past_space(text, 0)
    if text[at : at + 1] != "[":
        raise DataError(f"{file} does not begin with '[': expected a list of objects, or JSON lines in a .jsonl file")
    at, line, counted = past_space(text, at + 1), 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{file}:{line} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{file}:{line} holds a {type(row).__name__}, expected an object")
        yield Record(row, f"{file}:{line}")
        at = past_space(text, end)
        if text[at : at + 1] == ",":
            at = past_space(text, at + 1)
        elif text[at : at + 1] != "]":
            raise DataError(f"{file}:{line}: after this object a ',' or the closing ']' is missing")


def past_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def table(file: Path, delimiter: str) -> Iterator[Record]:
    """The first row names the columns."""
    reader = csv.DictReader(decoded(content_of(file), file).splitlines(keepends=True), delimiter=delimiter, strict=True)
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
