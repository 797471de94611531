"""Records: rows of a file or folder, each with the file and line on which it begins. One strict reader for all recipes.

A row that cannot be used is skipped and counted (`DropReport.skip`), and so are keys of rows that nothing reads; a file
that was cut off, or whose rest is unreadable, stops with file and line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llm_quest.data.document import DropReport
from llm_quest.data.folders import DATASET_METADATA, iter_files, select_split
from llm_quest.data.row_files import CONVERT_REMEDY, READERS, find_reader, open_binary, row_suffix
from llm_quest.errors import DataError, RowError

MAX_DEPTH = 64
"""Levels of lists and objects in a row."""
MAX_NUMBER_BITS = 4096
"""Of a whole number in a row."""
REPAIR = "repair or remove them"
"""What to do about unusable rows where no setting leaves them out."""


class TrackedRow(dict[str, Any]):
    """A row that remembers which of its keys were read, so that the others can be named.

    A key whose value is null counts as absent. `in` does not count as reading: the forms of rows are told apart by
    it. left_out: what else of the row is not used, in words."""

    def __init__(self, row: Mapping[str, Any]):
        super().__init__({key: value for key, value in row.items() if value is not None})
        self.read: set[str] = set()
        self.left_out: set[str] = set()
        self.parts: dict[str, list[TrackedRow]] = {}

    @classmethod
    def wrap(cls, row: Mapping[str, Any]) -> TrackedRow:
        return row if isinstance(row, TrackedRow) else cls(row)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def track_parts(self, key: str, parts: Sequence[Mapping[str, Any]]) -> list[TrackedRow]:
        """Objects inside the value of a key, such as messages, whose own keys are told apart too."""
        self.read.add(key)
        tracked = [TrackedRow(part) for part in parts]
        self.parts[key] = self.parts.get(key, []) + tracked
        return tracked

    def unread_keys(self) -> Iterator[str]:
        """The keys that nothing read; those of a part as `messages[].name`."""
        yield from self.left_out
        yield from (str(key) for key in self if key not in self.read)
        for key, parts in self.parts.items():
            yield from (f"{key}[].{inner}" for part in parts for inner in part.unread_keys())


class Record(NamedTuple):
    """A row of a file. where: file:line. weight: how often it is seen in an epoch."""

    row: Mapping[str, Any]
    where: str
    weight: float = 1.0


def map_columns(records: Iterable[Record], columns: Mapping[str, str], drop_report: DropReport) -> Iterator[Record]:
    """Rows under the keys that the recipe reads. columns: key -> the column that holds it. A column that a row does not
    have is told with those that it has."""
    for record in records if columns else ():
        missing = [column for column in columns.values() if column not in record.row]
        if missing:
            has = ", ".join(map(repr, record.row)) or "nothing"
            reason = f"has no column {missing[0]!r} (data.columns); it has {has}"
            drop_report.skip(RowError(record.where, f"no column {missing[0]!r}", reason))
            continue
        others = {key: value for key, value in record.row.items() if key not in columns.values()}
        replaced = [key for key in others if key in columns]
        drop_report.count_unused_keys(f"{key} (data.columns gives it another column)" for key in replaced)
        yield record._replace(row=others | {key: record.row[column] for key, column in columns.items()})
    if not columns:
        yield from records


T = TypeVar("T")


def parse_rows(records: Iterable[Record], parse: Callable[[Record], T], drop_report: DropReport) -> list[T]:
    """Every row that can be parsed; the report counts the others, and the keys that nothing read."""
    parsed = []
    for record in records:
        row = TrackedRow.wrap(record.row)
        try:
            parsed.append(parse(record._replace(row=row)))
        except RowError as error:
            drop_report.skip(error)
        else:
            drop_report.count_unused_keys(row.unread_keys())
    return parsed


def read_records(file: str | Path) -> list[Record]:
    """All rows of a file or folder. DataError with file and line where a row cannot be used, or where there is none."""
    drop_report = DropReport()
    records = list(iter_records(file, drop_report))
    drop_report.require_rows(len(records), str(file), strict=True, remedy=REPAIR)
    if not records:
        raise DataError(f"{file} holds no rows")
    return records


def iter_records(path: str | Path, drop_report: DropReport, split: str | None = None) -> Iterator[Record]:
    """The rows of a file, or of the files of a folder (`select_split`); the report counts what is skipped."""
    path = Path(path)
    if path.is_dir():
        yield from iter_folder(path, drop_report, split)
        return
    with open_binary(path) as file:
        try:
            for record in find_reader(path)(file, path):
                error = record if isinstance(record, RowError) else find_text_error(*record)
                if error is not None:
                    drop_report.skip(error)
                elif not isinstance(record, RowError):
                    yield Record(*record)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is not a whole gzip file ({error}): it was cut off; fetch it again") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def iter_folder(folder: Path, drop_report: DropReport, split: str | None = None) -> Iterator[Record]:
    """The rows of every file of a split that holds rows; hidden and other files are counted."""
    files = []
    for file in iter_files(folder, drop_report):
        if holds_rows(file):
            files.append(file)
        else:
            drop_report.drop(describe_unread_file(file), file.stat().st_size)
    for file in select_split(files, folder, split, drop_report):
        yield from iter_records(file, drop_report)


def holds_rows(file: Path) -> bool:
    """Whether a file of a folder holds rows, by its name."""
    return row_suffix(file) in READERS and file.name not in DATASET_METADATA


def describe_unread_file(file: Path) -> str:
    """Why a file of a folder is not read."""
    return "metadata of a data set" if file.name in DATASET_METADATA else f"suffix {file.suffix or 'none'}"


def find_text_error(value: Any, where: str) -> RowError | None:
    """What makes a value of a row no text: half of a surrogate pair (a JSON escape of an emoji that was cut off), a
    byte that is no UTF-8, a zero character, a number of thousands of digits, or values nested too deep to be copied."""
    stack = [(value, 0)]
    while stack:
        one, depth = stack.pop()
        if depth > MAX_DEPTH:
            return RowError(where, "nested too deep", f"has values nested more than {MAX_DEPTH} deep")
        if isinstance(one, dict):
            stack.extend((part, depth + 1) for pair in one.items() for part in pair)
        elif isinstance(one, list | tuple):
            stack.extend((part, depth + 1) for part in one)
        elif isinstance(one, int) and one.bit_length() > MAX_NUMBER_BITS:
            return RowError(
                where, "too large a number", f"holds a number of {one.bit_length():,} bits; write it as text"
            )
        elif isinstance(one, str) and (error := find_character_error(one, where)):
            return error
    return None


def find_character_error(text: str, where: str) -> RowError | None:
    if "\0" in text:
        return RowError(where, "a zero character", "holds a zero character (U+0000), which is no text; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        if "\udc80" <= half <= "\udcff":
            return RowError(where, "not UTF-8", f"is not UTF-8 (byte 0x{ord(half) - 0xDC00:02x}); {CONVERT_REMEDY}")
        reason = f"{half!r} is half of a surrogate pair alone, and no text; remove it"
        return RowError(where, "half a surrogate pair", reason)
    return None
