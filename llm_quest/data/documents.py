"""Documents: text files, JSON lines and folders are read; what is left out is counted, what is broken stops with
file and line. Nothing is repaired silently."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from llm_quest.errors import DataError

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
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


@dataclass(frozen=True)
class Document:
    """One text with a beginning and an end. source: where it came from; line: the line of that file on which it
    begins."""

    text: str
    source: str
    line: int = 1

    @cached_property
    def nbytes(self) -> int:
        """Bytes in UTF-8, the unit of bits per byte."""
        return len(self.text.encode())

    @cached_property
    def hash(self) -> str:
        """sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass
class DropReport:
    """What was kept, and what was dropped and why, in documents and bytes. Files that were never opened count their
    size."""

    kept: list[int] = field(default_factory=lambda: [0, 0])
    dropped: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files_with_separator: list[int] = field(default_factory=lambda: [0, 0])

    def keep(self, nbytes: int) -> None:
        self.kept = [self.kept[0] + 1, self.kept[1] + nbytes]

    def drop(self, reason: str, nbytes: int) -> None:
        count, size = self.dropped.get(reason, [0, 0])
        self.dropped[reason] = [count + 1, size + nbytes]

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def note_separator(self, separator: str, *, in_text: bool) -> None:
        """Count the files that hold the separator. A separator that is in no file makes one document of each, which a
        note says (a shell passes \\n as two characters)."""
        found, read = self.files_with_separator
        self.files_with_separator = [found + in_text, read + 1]
        silent = f"the separator {separator!r} is in none of the files: each is one document"
        if silent in self.notes:
            self.notes.remove(silent)
        if not self.files_with_separator[0]:
            self.note(silent)

    def as_json(self) -> dict[str, Any]:
        def pair(counts: list[int]) -> dict[str, int]:
            return {"documents": counts[0], "bytes": counts[1]}

        dropped = {reason: pair(counts) for reason, counts in sorted(self.dropped.items())}
        return {"kept": pair(self.kept), "dropped": dropped, "notes": list(self.notes)}

    def lines(self) -> list[str]:
        rows = [
            ("kept", self.kept),
            *((f"dropped: {reason}", counts) for reason, counts in sorted(self.dropped.items())),
        ]
        return [f"{name:<40} {count:>9,} documents {size:>14,} bytes" for name, (count, size) in rows] + self.notes


def read_documents(
    path: str | Path,
    drop_report: DropReport,
    *,
    column: str = "text",
    separator: str | None = None,
    suffixes: Collection[str] = TEXT_SUFFIXES,
) -> Iterator[Document]:
    """Read the documents of a folder, a JSON-lines file or a text file."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path, drop_report, column=column, separator=separator, suffixes=suffixes)
    if path.name.lower().endswith(JSON_LINES_SUFFIXES):
        return read_json_lines(path, drop_report, column=column)
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


def read_json_lines(file: str | Path, drop_report: DropReport, *, column: str = "text") -> Iterator[Document]:
    """One JSON object per line (also .gz), the text under `column`. Any other line stops with file and line."""
    file = require_regular_file(Path(file))
    with open_maybe_gzip(file) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    drop_report.drop("blank line", len(line))
                    continue
                text = text_column(parse_json_object(line, file, number), column, f"{file}:{number}")
                if text.strip():
                    drop_report.keep(len(text.encode()))
                    yield Document(text, str(file), number)
                else:
                    drop_report.drop("empty", len(text.encode()))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{file} is not a whole gzip file ({error}); fetch it again") from error


def read_folder(
    folder: str | Path,
    drop_report: DropReport,
    *,
    column: str = "text",
    separator: str | None = None,
    suffixes: Collection[str] = TEXT_SUFFIXES,
) -> Iterator[Document]:
    """Every text and JSON-lines file below a folder, by path. Hidden, binary, non-UTF-8 and other files are skipped
    and counted, as are links that lead out of the folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    wanted = {suffix.lower() for suffix in suffixes}
    for file in _iter_files(folder, drop_report):
        is_lines = file.name.lower().endswith(JSON_LINES_SUFFIXES)
        if not is_lines and file.suffix.lower() not in wanted:
            drop_report.drop(f"suffix {file.suffix or 'none'}", file.stat().st_size)
        elif is_lines:
            yield from read_json_lines(file, drop_report, column=column)
        elif reason := _unreadable_reason(file):
            drop_report.drop(reason, file.stat().st_size)
        else:
            yield from read_text(file, drop_report, separator=separator)


def _iter_files(folder: Path, drop_report: DropReport, top: Path | None = None) -> Iterator[Path]:
    """Regular files in sorted order; the report counts what is skipped."""
    inside = (top or folder).resolve()
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            drop_report.drop("hidden", _file_size(entry))
        elif entry.is_symlink() and (entry.is_dir() or not entry.resolve().is_relative_to(inside)):
            drop_report.drop("link to a folder or out of it", 0)
        elif entry.is_dir():
            yield from _iter_files(entry, drop_report, top or folder)
        elif entry.is_file():
            yield entry
        else:
            drop_report.drop("not a regular file", 0)


def _file_size(entry: Path) -> int:
    return entry.stat().st_size if entry.is_file() else 0


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


def open_maybe_gzip(file: Path) -> gzip.GzipFile | IO[bytes]:
    try:
        return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def decode_utf8(content: bytes, file: Path, first_line: int = 1) -> str:
    """Decode UTF-8 with or without a byte-order mark. first_line: the number of the first line, for the message."""
    if b"\0" in content:
        line = first_line + content.count(b"\n", 0, content.index(b"\0"))
        raise DataError(f"{file}:{line} holds a zero byte: this is a binary file (or UTF-16), expected UTF-8 text")
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise DataError(
            f"{file}:{line} is not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start}); "
            "convert it, for instance with `iconv -f LATIN1 -t UTF-8`"
        ) from None


def parse_json_object(line: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(decode_utf8(line, file, number))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{file}:{number} is not JSON ({error}); expected one object per line") from None
    if not isinstance(record, dict):
        raise DataError(f'{file}:{number} holds a {type(record).__name__}, expected an object like {{"text": ...}}')
    return record


def text_column(record: dict[str, Any], column: str, where: str) -> str:
    """What a row holds under `column`, if it is text. where: file:line, for the message."""
    if column not in record:
        raise DataError(f"{where} has no {column!r}; it has {', '.join(map(repr, record)) or 'nothing'}")
    text = record[column]
    if not isinstance(text, str):
        raise DataError(f"{where}: {column!r} is a {type(text).__name__}, expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {column!r} holds half a surrogate pair at character {error.start}") from None
    return text
