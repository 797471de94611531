"""Documents: each is counted once, as kept or as dropped with a reason; broken data stop with file and line."""

from __future__ import annotations

import gc
import gzip
import json
import os
import sys
from itertools import islice
from pathlib import Path

import pytest

from llm_quest.data.corpus import BUILTIN_CORPORA, load_corpus, module_docstrings
from llm_quest.data.document import DropReport
from llm_quest.data.documents import read_documents, read_folder, read_text
from llm_quest.errors import DataError, UsageError


def test_a_text_file_is_one_document(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo \xc3\xa9")
    [document] = read_text(tmp_path / "a.txt", ledger := DropReport())
    assert (document.text, document.line, document.nbytes) == ("one\r\ntwo é", 1, 11)
    assert ledger.as_json()["kept"] == {"documents": 1, "bytes": 11}


def test_a_separator_cuts_a_text_file_and_lines_are_kept(tmp_path: Path):
    (tmp_path / "a.txt").write_text("first\n----\n\nsecond\nmore\n----\n \n----\nlast")
    documents = list(read_text(tmp_path / "a.txt", ledger := DropReport(), separator="----"))
    assert [(d.text, d.line) for d in documents] == [("first", 1), ("second\nmore", 4), ("last", 9)]
    assert ledger.dropped == {"empty": [1, 3]}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_give_their_column(tmp_path: Path, name: str):
    lines = [json.dumps({"body": "one"}), "", json.dumps({"body": " "}), json.dumps({"body": "zwei é", "id": 3})]
    content = "\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    documents = list(read_documents(tmp_path / name, ledger := DropReport(), columns={"text": "body"}))
    assert [(d.text, d.line) for d in documents] == [("one", 1), ("zwei é", 4)]
    assert ledger.as_json() == {
        "kept": {"documents": 2, "bytes": 10},
        "dropped": {"empty": {"documents": 1, "bytes": 1}},
        "skipped": {"rows": 0, "kinds": {}, "first": []},
        "unused_keys": {"id": 1},
        "notes": [],
    }


def test_a_folder_is_read_in_order_and_everything_left_out_is_counted(tmp_path: Path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / ".git").mkdir()
    for name, content in {
        "b.md": b"# b",
        "sub/a.py": b"x = 1",
        "c.jsonl": b'{"text": "from lines"}',
        "latin.txt": b"caf\xe9",
        "binary.txt": b"a\0b",
        "photo.png": b"123",
        ".hidden.txt": b"secret",
        ".git/config.txt": b"secret",
    }.items():
        (root / name).write_bytes(content)
    (tmp_path / "outside.txt").write_text("outside")
    (root / "out.txt").symlink_to(tmp_path / "outside.txt")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.txt")
    ledger = DropReport()
    texts = [(Path(d.source).name, d.text) for d in read_folder(root, ledger)]
    assert texts == [("b.md", "# b"), ("c.jsonl", "from lines"), ("a.py", "x = 1")]
    assert {reason: count for reason, (count, _) in ledger.dropped.items()} == {
        "hidden": 2,
        "not UTF-8": 1,
        "binary": 1,
        "suffix .png": 1,
        "link to a folder or out of it": 2,
        "not a regular file": 1,
    }
    assert ledger.dropped["suffix .png"] == [1, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo\ncaf\xe9\n", r"a\.txt:3 is not UTF-8 \(byte 0xe9 at offset 11\)"),
        ("a.txt", b"one\n\0", r"a\.txt:2 holds a zero byte"),
        ("a.txt", b"", "holds no text: .*empty.*1 documents"),
        ("a.txt", b" \n ", "holds no text"),
        ("a.jsonl", b"", "holds no text: it is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl:2: is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]', r"a\.jsonl:2: holds a list"),
        ("a.jsonl", b'{"body": "a"}', r"a\.jsonl:1: has the keys body; expected those of one form: text"),
        ("a.jsonl", b'{"text": 5}', r"a\.jsonl:1: 'text' is a int, expected text"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: .* is half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl:2: is not UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 begins with '\[': the file is one JSON list"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-9], "not a whole gzip file"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz:1: is not JSON"),
    ],
)
def test_broken_data_stop_with_file_and_line(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_corpus(tmp_path / name, strict=True)


def test_what_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_corpus(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no text"):
        load_corpus(tmp_path)
    with pytest.raises(DataError, match="not a regular file"):
        load_corpus("/dev/null")


def test_a_text_is_taken_once(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("one", "two", "one")))
    corpus = load_corpus(tmp_path / "a.jsonl")
    assert [(d.text, d.line) for d in corpus.documents] == [("one", 1), ("two", 2)]
    assert corpus.drop_report.kept == [2, 6]
    assert corpus.drop_report.dropped == {"copy of another document": [1, 3]}
    assert "dropped: copy of another document" in corpus.drop_report.lines()[1]


def test_the_built_in_topics_are_the_interpreters_own():
    corpus = load_corpus("builtin:topics")
    assert 60 <= len(corpus.documents) <= 100
    assert 400_000 < corpus.nbytes == corpus.drop_report.kept[1]
    assert corpus.as_json()["python"].startswith("3.")
    assert corpus.sha256 == load_corpus("builtin:topics").sha256
    assert any('The "for" statement' in d.text for d in corpus.documents)


MODULE = b'''"""Title.

    More.
"""
import antigravity
class A(object):
    """A class."""
    async def go(self, x: int = 3, *rest) -> str:
        """Goes."""
def silent(): pass
'''


def test_docstrings_stand_below_their_signatures_and_nothing_is_run():
    assert (
        module_docstrings(MODULE, "m")
        == "m\n\nTitle.\n\nMore.\n\nm.A\n\nA class.\n\nm.A.go(self, x: int=3, *rest)\n\nGoes.\n\n"
    )
    assert module_docstrings(b"x = 1", "m") == ""
    assert "antigravity" not in sys.modules
    assert gc.isenabled()


def test_the_library_gives_a_document_per_module_and_leaves_tests_out():
    first = list(islice(BUILTIN_CORPORA["docstrings"](), 3))
    assert first[0].source == "docstrings:__future__"
    assert first[0].text.startswith("__future__\n\nRecord of phased-in incompatible language changes.")
    sources = [document.source for document in BUILTIN_CORPORA["source"]()]
    assert "source:textwrap" in sources
    assert not [
        source for source in sources if "site-packages" in source or ".test." in source or "_sysconfig" in source
    ]


def test_an_unknown_part_names_its_neighbor():
    with pytest.raises(
        UsageError, match="no part 'topic'; it has topics, docstrings, source; did you mean builtin:topics"
    ):
        load_corpus("builtin:topic")


def test_a_separator_that_is_in_no_file_is_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.txt").write_text("three")
    note = r"the separator '\\n\\n' is in none of the files: each is one document"
    assert load_corpus(tmp_path, separator="\\n\\n").drop_report.notes == [note]
    assert load_corpus(tmp_path, separator="\n\n").drop_report.notes == []
    assert load_corpus(tmp_path).drop_report.notes == []
