"""One table of exit codes: the docs, the classes and the help agree, and a failure has the same words everywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llm_quest import errors
from llm_quest.cli import output
from llm_quest.cli.output import explain_failure, run_with_exit_code

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"
CLASSES = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.QuestError) and "exit_code" in vars(kind)
]
FAILURES: list[BaseException] = [
    *(kind("the cause, the place and the remedy") for kind in CLASSES),
    MemoryError("out of memory"),
    OSError(28, "No space left on device", "file"),
    FileNotFoundError(2, "No such file or directory", "file"),
]


def exit_code_table() -> dict[int, str]:
    rows = re.findall(r"^\| ([\d, ]+) \| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.M)
    return {int(code): words for codes, words in rows for code in codes.split(",")}


def test_every_class_of_failure_has_a_row_of_its_own_in_the_docs_and_in_the_code():
    codes = exit_code_table()
    assert {kind.exit_code for kind in CLASSES} == set(range(1, 8))
    assert len({kind.exit_code for kind in CLASSES}) == len(CLASSES)
    assert set(codes) == {0, *range(1, 8), 130, 143}
    listed = {int(code) for code in re.findall(r"(?:^|[·,] )(\d+)(?=[ ,])", output.__doc__ or "", re.M)}
    assert listed >= set(codes) - {143}


@pytest.mark.parametrize("number", [*errors.DISK_REMEDIES, 13, 36])
@pytest.mark.parametrize(
    "name", ["n" * 5000, "/".join(["n" * 200] * 20), "two\nlines" * 90], ids=["long", "deep", "lines"]
)
def test_an_error_of_a_file_with_a_long_name_is_one_line_that_ends_with_the_cure(number: int, name: str):
    (line,) = explain_failure(OSError(number, "why it failed", name))[1]
    assert len(line) <= errors.LONGEST_LINE
    assert line.endswith(errors.DISK_REMEDIES.get(number, "why it failed")[-90:])


@pytest.mark.parametrize("failure", FAILURES, ids=lambda one: type(one).__name__)
def test_a_failure_has_the_same_words_on_a_terminal_and_in_json(failure, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quest", "show", "--json"])

    def fail() -> None:
        raise failure

    code = run_with_exit_code(fail)
    said = capsys.readouterr()
    reply = json.loads(said.out)["error"]
    assert (code, said.err.splitlines()) == explain_failure(failure)
    problems = {"problems": str(failure).splitlines()} if isinstance(failure, errors.QuestError) else {}
    assert reply == {"kind": type(failure).__name__, "message": said.err.rstrip("\n"), "exit_code": code, **problems}
    assert code in exit_code_table()
