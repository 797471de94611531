"""What people's files hold: rows that cannot be used are skipped with file, line and kind; what hides the rest of a
file stops."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_quest.data.document import DropReport
from llm_quest.data.records import iter_records, read_records
from llm_quest.data.row_files import READERS
from llm_quest.data.sources import DataSource, iter_source
from llm_quest.errors import DataError
from tests.later import Later

datasets, pyarrow, pq = Later("datasets"), Later("pyarrow"), Later("pyarrow.parquet")

GOOD = {"prompt": "a", "completion": "b"}
LINE = json.dumps(GOOD).encode()


def rows_of(file: Path, report: DropReport | None = None) -> list[dict[str, Any]]:
    return [dict(one.row) for one in iter_records(file, DropReport() if report is None else report)]


def table(delimiter: str) -> Callable[[list[dict[str, Any]]], bytes]:
    def write(rows: list[dict[str, Any]]) -> bytes:
        quoted = [['"' + str(value).replace('"', '""') + '"' for value in row.values()] for row in rows]
        return "\r\n".join(delimiter.join(cells) for cells in [list(rows[0]), *quoted]).encode()

    return write


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pq.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows, ensure_ascii=False, indent=1).encode(),
    ".csv": table(","),
    ".tsv": table("\t"),
    ".parquet": parquet,
}
ODD_TEXTS = ["one\u2028two\u2029three\u0085four", 'a "quoted", cell\nof two lines', "x" * 1_200_000, "\U0001f600 é"]


def test_every_reader_is_tried() -> None:
    assert list(WRITERS) == list(READERS)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("suffix", list(READERS))
def test_every_kind_of_file_gives_the_same_rows_whatever_their_texts_hold(
    tmp_path: Path, suffix: str, packed: bool
) -> None:
    """Byte-order marks, CRLF, separators of lines inside of a text, a million characters."""
    rows = [{"prompt": text, "completion": "b"} for text in ODD_TEXTS]
    content = WRITERS[suffix](rows)
    file = tmp_path / f"rows{suffix}{'.gz' if packed else ''}"
    file.write_bytes(gzip.compress(content, 1) if packed else content)
    report = DropReport()
    assert rows_of(file, report) == rows
    assert not report.skipped


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        (b'{"prompt": "caf\xe9"}', "not UTF-8", r"rows\.jsonl:2: is not UTF-8 \(byte 0xe9\).*iconv"),
        (b'{"prompt": "a\0"}', "a zero byte", "holds a zero byte"),
        (b'{"prompt": "a\\u0000"}', "a zero character", "zero character"),
        (b'{"prompt": "a\\ud83d"}', "half a surrogate pair", "half of a surrogate pair"),
        (b'{"messages": [{"content": "\\udc00"}]}', "half a surrogate pair", "half of a surrogate pair"),
        (b'{"prompt": ', "not JSON", "is not JSON"),
        (b'{"id": ' + b"1" * 5000 + b"}", "not JSON", "digits"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nested too deep", "nested more than 64 deep"),
        (b"[" * 100_000, "not JSON", "is not JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "a key twice", "the key 'prompt' twice"),
        (b'["a"]', "not an object", "holds a list, expected an object"),
        (b"null", "not an object", "holds a NoneType"),
    ],
)
def test_a_line_that_cannot_be_used_is_skipped_counted_and_named(
    tmp_path: Path, line: bytes, kind: str, said: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([LINE, line, b"", LINE]))
    report = DropReport()
    assert rows_of(file, report) == [GOOD, GOOD]
    assert dict(report.skipped) == {kind: 1}
    with pytest.raises(DataError, match=said) as error:
        read_records(file)
    assert "1 row cannot be used" in str(error.value)
    assert f"{file}:2: " in report.skipped_rows[0]


@pytest.mark.parametrize(
    ("name", "content", "kept", "kind"),
    [
        ("a.json", b'[{"a": "caf\xe9"},\n {"a": "b"}]', 1, "not UTF-8"),
        ("a.json", b'[{"a": 1, "a": 2},\n {"a": "b"}]', 1, "a key twice"),
        ("a.json", b'{"a": "b"}\n{"a": "c"}\n', 2, ""),
        ("a.csv", b"a,b\ncaf\xe9,1\nx,2\n", 1, "not UTF-8"),
        ("a.csv", b"a,b\n1,2,3\n4,5\n\n", 1, "another number of cells"),
        ("a.csv", b'a,b\n"x"y,2\n4,5\n', 1, "not a table's row"),
    ],
)
def test_a_row_of_a_list_or_table_that_cannot_be_used_is_skipped(
    tmp_path: Path, name: str, content: bytes, kept: int, kind: str
) -> None:
    (tmp_path / name).write_bytes(content)
    report = DropReport()
    assert len(rows_of(tmp_path / name, report)) == kept
    assert list(report.skipped) == ([kind] if kind else [])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"a,b,a\n1,2,3\n", r"a\.csv:1 names the column 'a' twice"),
        ("a.csv", b'a,b\n1,"2\n3,4\n', r"a\.csv:2: a quote that is opened here never ends"),
        ("a.csv", "a,b\n1,2".encode("utf-16"), "is binary, or UTF-16"),
        ("a.json", '[{"a": 1}]'.encode("utf-16"), "is binary, or UTF-16"),
        ("a.json", b'[{"a": 1},\n{"a": oops}]', r"a\.json:2 is not JSON"),
        ("a.parquet", b"PAR1 and no more", "is no whole Parquet file"),
        ("a.jsonl.gz", gzip.compress(LINE * 99, mtime=0)[:-9], "cut off; fetch it again"),
        ("a.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 99, mtime=0)[:-9], "cut off; fetch it again"),
        ("a.jsonl.gz", b"\x1f\x8bno gzip", "not a whole gzip file"),
        ("a.jsonl", json.dumps([GOOD], indent=1).encode(), r"a\.jsonl:1 begins with '\['.*name it \.json"),
        ("a.xlsx", b"x", r"ends in \.xlsx; rows are read from \.jsonl"),
    ],
)
def test_what_hides_the_rest_of_a_file_stops(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        rows_of(tmp_path / name)


def test_a_folder_gives_the_rows_of_its_files_by_path_and_counts_the_others(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, rows in (("b.jsonl", ["1"]), ("a.csv", ["2", "3"]), ("deep/c.parquet", ["4"]), (".hidden.jsonl", ["5"])):
        (tmp_path / name).write_bytes(WRITERS[Path(name).suffix]([{"prompt": one} for one in rows]))
    (tmp_path / "README.md").write_text("# rows")
    report = DropReport()
    assert [row["prompt"] for row in rows_of(tmp_path, report)] == ["2", "3", "1", "4"]
    assert set(report.dropped) == {"hidden", "suffix .md"}


def test_bad_rows_are_shown_by_reason_with_their_places_and_counts_by_kind(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([LINE, *[b"{"] * 12, b"[]"]))
    with pytest.raises(DataError) as error:
        read_records(file)
    lines = str(error.value).splitlines()
    assert "13 rows cannot be used (12 x not JSON, 1 x not an object)" in lines[0]
    assert lines[1].startswith(f"{file}:2: is not JSON")
    assert lines[1].endswith(f"(the same at {', '.join(f':{number}' for number in range(3, 12))})")
    assert lines[2:] == [f"{file}:14: holds a list, expected an object", "... and 2 more rows"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", gzip.compress(LINE, mtime=0)),  # a download that lost its .gz, and one that kept it
        ("a.jsonl.gz", LINE),
        ("a.csv.gz", b"prompt,completion\na,b"),
        ("a.jsonl", b"\xef\xbb\xbf" + LINE + b"\n\xef\xbb\xbf\n\xef\xbb\xbf" + LINE),  # two files, joined
        ("a.csv", b"prompt;completion\r\na;b\r\n"),
        ("a.csv", b"prompt\tcompletion\na\tb\n"),
        ("a.csv", b" prompt , completion\na,b\n"),
        ("a.csv", b"\xef\xbb\xbfprompt,completion\ra,b\r"),
    ],
)
def test_files_as_other_programs_write_them_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    report = DropReport()
    found = rows_of(tmp_path / name, report)
    assert found == [GOOD] * len(found)
    assert found
    assert not report.skipped


CALLS = [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "clock", "arguments": {"zone": 3}}]


@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_a_call_has_its_own_arguments_and_not_those_of_every_other_function(tmp_path: Path, kind: str) -> None:
    """A typed table gives every object of a column the keys of all of them, null."""
    rows = [{"messages": [{"role": "assistant", "tool_calls": [{"function": call}]}], "n": [1, None]} for call in CALLS]
    if kind == "parquet":
        (tmp_path / "a.parquet").write_bytes(parquet(rows))
        source = DataSource(str(tmp_path / "a.parquet"))
    else:
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "hub")
        source = DataSource(f"hf:{tmp_path / 'hub'}")
    found = [dict(one.row) for one in iter_source(source, DropReport())]
    assert [row["messages"][0]["tool_calls"][0]["function"] for row in found] == CALLS
    assert found[0]["n"] == [1, None], "a null in a list keeps its place"
