"""Files of rows: each kind of file as rows with the line on which each begins.

    .jsonl .ndjson   one JSON object a line           .csv .tsv   a table whose first line names the columns
    .json            a list of objects, or objects    .parquet    a table; numbers of rows in place of lines
    *.gz             the same, compressed; a file's first bytes say whether it is

A row that cannot be used is a `RowError` among the others; what makes the rest of a file unreadable is raised."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from llm_quest.errors import DataError, RowError, import_extra, install_command
from llm_quest.files import iter_lines

MAX_CELL_CHARACTERS = 2**31 - 1
GZIP_MAGIC, BYTE_ORDER_MARK = b"\x1f\x8b", b"\xef\xbb\xbf"
MIN_UNPACKED_BYTES, MAX_UNPACKING = 200_000_000, 100
"""Compressed rows that are read whole: so many bytes, or so many times the packed ones. English text shrinks to a
third or a quarter, equal rows to a hundredth."""
MAX_ROWS_PER_BYTE = 8

FoundRow = tuple[dict[str, Any], str] | RowError
"""A row with its file:line, or what is wrong with it."""
FileReader = Callable[[IO[bytes], Path], Iterator[FoundRow]]


def open_binary(file: Path) -> IO[bytes]:
    """A regular file, decompressed if its bytes are gzip's, whatever its name: downloads keep `.gz` or lose it."""
    if not file.exists():
        raise DataError(f"{file} does not exist")
    if not file.is_file():
        raise DataError(f"{file} is not a regular file")
    try:
        with file.open("rb") as opened:
            compressed = opened.read(2) == GZIP_MAGIC
        return gzip.open(file, "rb") if compressed else file.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def read_whole(file: IO[bytes], name: Path) -> bytes:
    """All bytes. DataError for a .gz that unpacks to more than any text does: a bomb."""
    packed = name.stat().st_size
    limit = max(MIN_UNPACKED_BYTES, MAX_UNPACKING * packed)
    is_packed = isinstance(file, gzip.GzipFile)
    content = file.read(limit + 1) if is_packed else file.read()
    if is_packed and len(content) > limit:
        raise DataError(f"{name} has {packed:,} bytes and unpacks to more than {limit:,}; unpack it and look at it")
    return content


def row_suffix(file: Path) -> str:
    """The suffix that says what a file holds: the one before .gz."""
    name = file.name.lower().removesuffix(".gz")
    return Path(name).suffix


def find_reader(file: Path) -> FileReader:
    suffix = row_suffix(file)
    if suffix not in READERS:
        raise DataError(f"{file} ends in {suffix or 'nothing'}; rows are read from {', '.join(READERS)} and these .gz")
    return READERS[suffix]


def iter_json_lines(file: IO[bytes], name: Path) -> Iterator[FoundRow]:
    """One object a line. DataError where the file is one list."""
    first = True
    for number, line in iter_lines(file):
        where, line = f"{name}:{number}", line.removeprefix(BYTE_ORDER_MARK)  # within a file: two were joined
        if not line.strip():
            continue
        if first and line.lstrip().startswith(b"["):
            raise DataError(f"{where} begins with '[': the file is one JSON list and not a row a line; name it .json")
        first = False
        try:
            yield parse_json_object(line, where), where
        except RowError as error:
            yield error


def parse_json_object(line: bytes, where: str) -> dict[str, Any]:
    """The object of a line. RowError for bytes that are no UTF-8, text that is no JSON, and anything but an object."""
    return require_object(parse_json(decode_line(line, where), where), where)


def require_object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RowError(where, "not an object", f"holds a {type(row).__name__}, expected an object")
    return row


def decode_line(line: bytes, where: str) -> str:
    if b"\0" in line:
        raise RowError(where, "a zero byte", "holds a zero byte: binary, or UTF-16; expected UTF-8 text")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(where, "not UTF-8", f"is not UTF-8 (byte 0x{line[error.start]:02x}); {CONVERT_REMEDY}") from None


CONVERT_REMEDY = "convert the file, for instance with `iconv -f LATIN1 -t UTF-8`"


def parse_json(text: str, where: str) -> Any:
    """JSON without a key twice in one object. RowError for anything else."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RowError as error:
        raise RowError(where, error.kind, str(error).removeprefix(": ")) from None
    except (ValueError, RecursionError) as error:
        raise RowError(where, "not JSON", f"is not JSON ({error})") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError("", "a key twice", f"has the key {twice!r} twice in one object; keep one")
    return mapping


def iter_json(file: IO[bytes], name: Path) -> Iterator[FoundRow]:
    """The objects of a JSON list, or objects one after another, each with its line."""
    text = decode_whole(read_whole(file, name), name)
    at = skip_whitespace(text, 0)
    is_list = text[at : at + 1] == "["
    if not is_list and text[at : at + 1] != "{":
        raise DataError(f"{name} does not begin with '[' or '{{': expected a list of objects")
    at, line, counted = skip_whitespace(text, at + 1) if is_list else at, 1, 0
    while text[at : at + 1] != ("]" if is_list else ""):
        line, counted = line + text.count("\n", counted, at), at
        where = f"{name}:{line}"
        value, end = decode_object(text, at, where)
        yield value
        at = skip_separator(text, end, where) if is_list else skip_whitespace(text, end)


def decode_object(text: str, at: int, where: str) -> tuple[FoundRow, int]:
    """The object that begins here, and where it ends. DataError where the text is no JSON, which hides all that
    follows."""
    try:
        end = json.JSONDecoder().raw_decode(text, at)[1]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error})") from None
    try:
        return (require_object(parse_json(text[at:end], where), where), where), end
    except RowError as error:
        return error, end


def skip_separator(text: str, at: int, where: str) -> int:
    """Past the comma after an object, or at the list's end."""
    at = skip_whitespace(text, at)
    if text[at : at + 1] == ",":
        return skip_whitespace(text, at + 1)
    if text[at : at + 1] != "]":
        raise DataError(f"{where}: after this object a ',' or the closing ']' is missing")
    return at


def skip_whitespace(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def decode_whole(content: bytes, name: Path) -> str:
    """The text of a file. Bytes that are no UTF-8 become lone surrogates, which `find_text_error` names in their
    row."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:100]:
        raise DataError(f"{name} is binary, or UTF-16; save it as UTF-8")
    return content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def iter_table(file: IO[bytes], name: Path) -> Iterator[FoundRow]:
    """The rows of a table, whose first row names the columns."""
    before = csv.field_size_limit(MAX_CELL_CHARACTERS)
    try:
        text = decode_whole(read_whole(file, name), name)
        delimiter, lines = find_delimiter(text, row_suffix(name)), io.StringIO(text, newline="")
        yield from iter_cells(csv.reader(lines, delimiter=delimiter, strict=True), name, delimiter)
    finally:
        csv.field_size_limit(before)


def find_delimiter(text: str, suffix: str) -> str:
    """What separates the cells: a tab in .tsv; in .csv a comma, or where the first line has none a semicolon or a tab,
    as spreadsheets of many languages write."""
    header = text.partition("\n")[0]
    others = [mark for mark in (";", "\t") if mark in header and "," not in header]
    return "\t" if suffix == ".tsv" else others[0] if others else ","


def iter_cells(reader: Any, name: Path, delimiter: str) -> Iterator[FoundRow]:
    columns: list[str] | None = None
    while True:
        first = reader.line_num + 1
        where = f"{name}:{first}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(f"{where}: a quote that is opened here never ends; double or remove it") from None
            yield RowError(where, "not a table's row", f"is no row of a table ({error})")
            continue
        if columns is None:
            columns = check_columns([cell.strip() for cell in cells], where)
        elif cells and len(cells) != len(columns):
            reason = f"has {len(cells)} cells, the first line names {len(columns)}; quote cells that hold {delimiter!r}"
            yield RowError(where, "another number of cells", reason)
        elif cells:
            yield dict(zip(columns, cells, strict=True)), where


def check_columns(columns: list[str], where: str) -> list[str]:
    """DataError for a name that stands twice: of two cells one would be lost."""
    for name in columns:
        if columns.count(name) > 1:
            raise DataError(f"{where} names the column {name!r} twice; rename one")
    return columns


def iter_parquet(file: IO[bytes], name: Path) -> Iterator[FoundRow]:
    """The rows of a Parquet file; their numbers stand in place of lines."""
    parquet = import_extra("pyarrow.parquet", f"{name}: Parquet needs it: {install_command('parquet')}")
    try:
        number = 0
        table = parquet.ParquetFile(file)
        refuse_parquet_bomb(table.metadata, name)
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield without_nulls(row), f"{name}:{number}"
    except DataError:
        raise
    except Exception as error:  # Python's too, of a date beyond its own or a time zone that it does not know
        what = f"or row {number + 1:,} holds what Python cannot ({str(error).partition('.')[0]})"
        raise DataError(f"{name} is no whole Parquet file, {what}; fetch it again") from None


def without_nulls(value: Any) -> Any:
    """A row of a typed table without the nulls inside it. Commonly got wrong: all objects of a column have the keys of
    any of them there, so that every call of a function has the arguments of all functions, most of them null, and a
    chat template writes those out."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def refuse_parquet_bomb(metadata: Any, name: Path) -> None:
    """DataError where a table claims far more rows or bytes than its file can hold of data that differ."""
    packed = name.stat().st_size
    unpacked = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    too_large = unpacked > max(MIN_UNPACKED_BYTES, MAX_UNPACKING * packed)
    if too_large or metadata.num_rows > MAX_ROWS_PER_BYTE * packed:
        raise DataError(
            f"{name} has {packed:,} bytes and claims {metadata.num_rows:,} rows of {unpacked:,} bytes: not data to "
            "learn from, or damaged"
        )


READERS: dict[str, FileReader] = {
    ".jsonl": iter_json_lines,
    ".ndjson": iter_json_lines,
    ".json": iter_json,
    ".csv": iter_table,
    ".tsv": iter_table,
    ".parquet": iter_parquet,
}
"""Suffix -> the reader of files that end so, also with .gz behind it."""
