"""Documents: text files, rows and folders are read; what is left out is counted, a text file that is broken stops with
file and line. Nothing is repaired silently."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_quest.data.document import Document, DropReport
from llm_quest.data.folders import iter_files, select_split
from llm_quest.data.records import (
    Record,
    TrackedRow,
    describe_unread_file,
    holds_rows,
    iter_records,
    map_columns,
    read_records,
)
from llm_quest.data.row_files import READERS, row_suffix
from llm_quest.data.row_forms import TEXT_FORMS, select_form
from llm_quest.errors import DataError, RowError

PROSE_SUFFIXES = (".txt", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc")
SCRIPT_SUFFIXES = (".py", ".pyi", ".js", ".jsx", ".ts", ".tsx", ".rb", ".php", ".lua", ".jl", ".r", ".sh", ".sql")
COMPILED_LANGUAGE_SUFFIXES = (
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".cu",
    ".rs",
    ".go",
    ".java",
    ".kt",
    ".scala",
    ".swift",
    ".hs",
    ".ml",
)
MARKUP_SUFFIXES = (".html", ".css", ".toml", ".yaml", ".yml")
TEXT_SUFFIXES = frozenset((*PROSE_SUFFIXES, *SCRIPT_SUFFIXES, *COMPILED_LANGUAGE_SUFFIXES, *MARKUP_SUFFIXES))


def read_documents(
    path: str | Path,
    drop_report: DropReport,
    *,
    columns: Mapping[str, str] | None = None,
    separator: str | None = None,
    suffixes: Collection[str] = TEXT_SUFFIXES,
    split: str | None = None,
) -> Iterator[Document]:
    """Read the documents of a folder, a file of rows or a text file. columns: see `map_columns`. split: see
    `read_folder`."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path, drop_report, columns=columns, separator=separator, suffixes=suffixes, split=split)
    if row_suffix(path) in READERS:
        return row_documents(map_columns(iter_records(path, drop_report), columns or {}, drop_report), drop_report)
    return read_text(path, drop_report, separator=separator)


def read_text(file: str | Path, drop_report: DropReport, *, separator: str | None = None) -> Iterator[Document]:
    """A UTF-8 text file: one document, or several between separators (line ends around a separator belong to it)."""
    file = require_regular_file(Path(file))
    text = decode_utf8(read_file_bytes(file), file)
    if separator is not None:
        drop_report.note_separator(separator, in_text=separator in text)
    line = 1
    for part in [text] if separator is None else text.split(separator):
        body = part if separator is None else part.strip("\r\n")
        before = len(part) - len(part.lstrip("\r\n")) if separator is not None else 0
        if body.strip():
            drop_report.keep(len(body.encode()))
            yield Document(body, str(file), line + part.count("\n", 0, before))
        else:
            drop_report.drop("empty", len(part.encode()))
        line += part.count("\n") + (separator or "").count("\n")


def row_documents(records: Iterable[Record], drop_report: DropReport) -> Iterator[Document]:
    """The text of each row, under the key `text`; the report counts rows without one, and keys that nothing reads."""
    for record in records:
        row = TrackedRow.wrap(record.row)
        try:
            text = select_form(TEXT_FORMS, row, record.where).parse(row, record.where)
        except RowError as error:
            drop_report.skip(error)
            continue
        drop_report.count_unused_keys(row.unread_keys())
        if text.strip():
            drop_report.keep(len(text.encode()))
            source, _, line = record.where.rpartition(":")
            yield Document(text, source, int(line), record.weight)
        else:
            drop_report.drop("empty", len(text.encode()))


def read_folder(
    folder: str | Path,
    drop_report: DropReport,
    *,
    columns: Mapping[str, str] | None = None,
    separator: str | None = None,
    suffixes: Collection[str] = TEXT_SUFFIXES,
    split: str | None = None,
) -> Iterator[Document]:
    """Every text file and file of rows (but .json) below a folder, by path. Hidden, binary, non-UTF-8 and other files
    are skipped and counted, as are links that lead out of the folder. split: of the files of rows (`select_split`);
    with one, texts are not read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    wanted = {suffix.lower() for suffix in suffixes}
    files = list(iter_files(folder, drop_report))
    of_rows = [file for file in files if holds_rows(file) and row_suffix(file) != ".json"]
    chosen = set(select_split(of_rows, folder, split, drop_report))
    for file in files:
        if file in chosen:
            yield from read_documents(file, drop_report, columns=columns)
        elif file in of_rows:
            continue
        elif file.suffix.lower() not in wanted or split is not None:
            drop_report.drop(describe_unread_file(file), file.stat().st_size)
        elif reason := _unreadable_reason(file):
            drop_report.drop(reason, file.stat().st_size)
        else:
            yield from read_text(file, drop_report, separator=separator)


def _unreadable_reason(file: Path) -> str | None:
    content = read_file_bytes(file)
    if b"\0" in content:
        return "binary"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    return None


def require_regular_file(file: Path) -> Path:
    if not file.exists():
        raise DataError(f"{file} does not exist")
    if not file.is_file():
        raise DataError(f"{file} is not a regular file")
    return file


def read_file_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def decode_utf8(content: bytes, file: Path) -> str:
    """Decode UTF-8 with or without a byte-order mark."""
    if b"\0" in content:
        line = 1 + content.count(b"\n", 0, content.index(b"\0"))
        raise DataError(f"{file}:{line} holds a zero byte: this is a binary file (or UTF-16), expected UTF-8 text")
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise DataError(
            f"{file}:{line} is not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start}); "
            "convert it, for instance with `iconv -f LATIN1 -t UTF-8`"
        ) from None


def text_column(row: Mapping[str, Any], column: str, where: str) -> str:
    """What a row holds under `column`, if it is text. where: file:line, for the message."""
    if column not in row:
        has = ", ".join(map(repr, row)) or "nothing"
        raise RowError(where, f"no {column!r}", f"has no {column!r}; it has {has}")
    text = row[column]
    if not isinstance(text, str):
        raise RowError(where, f"{column!r} is no text", f"{column!r} is a {type(text).__name__}, expected text")
    return text


def read_prompts(file: str | Path) -> list[Document]:
    """The prompts in the file's order. Of a file of rows: the column `prompt`, which may be empty (a text from its very
    beginning). Of any other file: its lines, without blank ones."""
    file = Path(file)
    if row_suffix(file) in READERS:
        rows = read_records(file)
        return [Document(text_column(record.row, "prompt", record.where), record.where) for record in rows]
    documents = list(read_text(file, DropReport(), separator="\n"))
    if not documents:
        raise DataError(f"{file} holds no prompts: write one a line, or rows with 'prompt' in a .jsonl file")
    return [Document(document.text, f"{document.source}:{document.line}", document.line) for document in documents]
