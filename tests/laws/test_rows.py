"""Laws of rows, over every form of every recipe: a key of a row is read, or named once with its count; and JSON lines
are split in one place."""

from __future__ import annotations

import ast
import copy
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_quest.data.conversation_forms import RowForm
from llm_quest.data.conversations import read_conversations
from llm_quest.data.document import DropReport
from llm_quest.data.documents import row_documents
from llm_quest.data.image_text import read_caption_rows
from llm_quest.data.messages import EXTRA_MESSAGE_KEYS
from llm_quest.data.preferences import read_preferences
from llm_quest.data.prompt_rows import PromptRow, read_prompt_rows
from llm_quest.data.records import Record, iter_records
from llm_quest.data.row_forms import ROW_FORMS, describe_forms
from llm_quest.data.step_labels import read_labeled_steps
from llm_quest.data.template_messages import MessageWriter
from llm_quest.data.text_classification import read_labeled_texts
from llm_quest.data.unpaired import read_unpaired

Reader = Callable[[Iterable[Record], DropReport], list[Any]]
READERS: dict[str, Reader] = {
    "pretrain": lambda records, report: list(row_documents(records, report)),
    "sft": read_conversations,
    "reward, dpo": read_preferences,
    "kto": read_unpaired,
    "prm": read_labeled_steps,
    "grpo": read_prompt_rows,
    "classify": read_labeled_texts,
    "vlm": read_caption_rows,
}
FORMS = [(kind, form) for kind, forms in ROW_FORMS.items() for form in forms]
NAMES = [f"{kind}: {form.name}" for kind, form in FORMS]
each_form = pytest.mark.parametrize(("kind", "form"), FORMS, ids=NAMES)
OPTIONAL: dict[str, Any] = {
    "system": "Be brief.",
    "history": [["1+1?", "2"]],
    "tools": [{"type": "function", "function": {"name": "add"}}],
    "input": "in words",
    "context": "a context",
    "margin": 2.0,
    "answer": "4",
    "ground_truth": "4",
    "solution": "4",
}
"""A value of every key that some form may have besides its own."""


def read(kind: str, row: Mapping[str, Any], folder: Path) -> tuple[list[Any], DropReport]:
    report = DropReport()
    (folder / "a.png").touch()
    return READERS[kind]([Record(row, f"{folder}/rows.jsonl:1")], report), report


def test_every_kind_of_row_has_its_reader_here() -> None:
    assert set(READERS) == set(ROW_FORMS)


@each_form
def test_the_example_of_a_form_is_read_by_that_form_and_nothing_of_it_is_left(
    kind: str, form: RowForm, tmp_path: Path
) -> None:
    assert set(form.keys) <= set(form.example)
    found, report = read(kind, form.example, tmp_path)
    assert found
    assert not report.skipped
    assert not report.unused_keys


@each_form
def test_a_key_that_nobody_knows_is_named_with_its_count(kind: str, form: RowForm, tmp_path: Path) -> None:
    row = {**form.example, "surprise": 1, "id": "7", "empty": None}
    report = DropReport()
    (tmp_path / "a.png").touch()
    READERS[kind]([Record(row, f"{tmp_path}/rows.jsonl:{n}") for n in (1, 2)], report)
    every_column_goes_to_rewards = kind == "grpo"
    assert report.unused_keys == ({} if every_column_goes_to_rewards else {"surprise": 2, "id": 2})
    if report.unused_keys:
        assert report.remarks() == ["keys that nothing reads, and in how many rows: id (2), surprise (2)"]


def messages_in(row: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every message of a row, with the key under which it stands."""
    for key, value in row.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict) and {"role", "from"} & set(one):
                yield key, one


MESSAGES = [(kind, form) for kind, form in FORMS if list(messages_in(form.example))]


@pytest.mark.parametrize(("kind", "form"), MESSAGES, ids=lambda one: one if isinstance(one, str) else one.name)
def test_a_key_of_a_message_that_nobody_knows_is_named(kind: str, form: RowForm, tmp_path: Path) -> None:
    row = copy.deepcopy(dict(form.example))
    for _, message in messages_in(row):
        message["surprise"] = 1
    found, report = read(kind, row, tmp_path)
    assert found
    assert set(report.unused_keys) == {f"{key}[].surprise" for key, _ in messages_in(row)}


@each_form
def test_every_key_that_a_form_may_have_is_read_and_changes_what_is_read(
    kind: str, form: RowForm, tmp_path: Path
) -> None:
    plain = repr(read(kind, form.example, tmp_path)[0])
    for key in form.optional:
        found, report = read(kind, {**form.example, key: OPTIONAL[key]}, tmp_path)
        assert found, (key, report.skipped_rows)
        assert not report.unused_keys, key
        assert repr(found) != plain or form.example.get(key) == OPTIONAL[key], f"{key} is read and changes nothing"


@each_form
def test_a_value_of_a_wrong_kind_is_skipped_and_never_ends_the_run(kind: str, form: RowForm, tmp_path: Path) -> None:
    for key in (*form.keys, *form.optional):
        for wrong in (3.5, [3.5], {"a": 1}, [[]], [{"role": "user", "content": 1}], ""):
            found, report = read(kind, {**form.example, key: wrong}, tmp_path)
            assert found or report.skipped or report.dropped or kind == "grpo", (key, wrong)


def as_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row as a table holds it: lists and numbers as JSON text."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}


def read_table(kind: str, row: Mapping[str, Any], folder: Path) -> tuple[str, DropReport]:
    """What is read of a row in a table of one row."""
    text = io.StringIO()
    table = csv.DictWriter(text, row)
    table.writeheader()
    table.writerow(row)
    (folder / "rows.csv").write_text(text.getvalue(), encoding="utf-8")
    report = DropReport()
    records = [one._replace(where=f"{folder}/rows.jsonl:1") for one in iter_records(folder / "rows.csv", report)]
    return show_rows(READERS[kind](records, report)), report


def show_rows(found: list[Any]) -> str:
    """What was read, but for the columns that rewards are given as they stand in the file."""
    return repr([replace(one, columns={}) if isinstance(one, PromptRow) else one for one in found])


@each_form
def test_cells_of_a_table_are_read_as_the_values_that_they_spell_and_empty_ones_are_absent(
    kind: str, form: RowForm, tmp_path: Path
) -> None:
    empty = {key: "" for key in form.optional if key not in form.example}
    plain = show_rows(read(kind, form.example, tmp_path)[0])
    assert read_table(kind, as_cells(form.example) | empty, tmp_path)[0] == plain
    for key in form.optional:
        row = {**form.example, key: OPTIONAL[key]}
        found, report = read_table(kind, as_cells(row), tmp_path)
        assert found == show_rows(read(kind, row, tmp_path)[0]), (key, report.skipped_rows)


ODD = (
    3.5,
    True,
    "f()",
    [],
    {},
    [3.5],
    [{"id": 1}],
    [{"name": 5}],
    {"function": "f"},
    [{"function": {"name": "f"}}],
    "[1]",
    "{",
)


@pytest.mark.parametrize("key", EXTRA_MESSAGE_KEYS)
def test_an_odd_value_beside_a_message_is_refused_before_the_template_sees_it(key: str) -> None:
    source = "{{ tools }}{% for m in messages %}{{ m.reasoning_content + m.name }}{{ m.tool_calls }}{% endfor %}"
    writer, kept = MessageWriter(source, lambda text: text), 0
    for value in ODD:
        answer = {"role": "assistant", "content": "b", key: value}
        report = DropReport()
        record = Record({"messages": [{"role": "user", "content": "a"}, answer]}, "rows.jsonl:1")
        for one in read_conversations([record], report):
            written = writer.write(one.message_dicts)[1]
            assert key not in written or isinstance(written[key], list if key == "tool_calls" else str | int)
            kept += 1
        assert report.skipped or key not in report.unused_keys
    assert 0 < kept < len(ODD), "some are values, and some are none"


@pytest.mark.parametrize("recipe", ["sft", "reward, dpo", "kto", "grpo"])
def test_messages_as_python_prints_them_are_refused_and_never_learned_as_text(recipe: str) -> None:
    printed = str([{"role": "user", "content": "2+2?"}])
    rest = {"completion": "4", "label": 1} if recipe in ("sft", "kto") else {"chosen": "4", "rejected": "5"}
    report = DropReport()
    assert READERS[recipe]([Record({"prompt": printed, **rest}, "a.csv:2")], report) == []
    assert report.skipped == {"messages that are no JSON": 1}


PACKAGE = Path(__file__).parents[2] / "llm_quest"
SPLITTERS = {
    "data/builtin_qa.py": "pieces of a text",
    "report/page.py": "a config for the page",
}
"""Files that call `splitlines` on more than a message, and on what: never on data."""
READS_DATA = ("data", "eval", "recipes", "report", "rollouts", "train")
"""Packages that read what users or runs have written."""
MESSAGES_OF_PROGRAMS = re.compile(r"str\((error|output)\)|stderr|reason")


def calls_of(tree: ast.AST, name: str) -> list[ast.Call]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [node for node in found if isinstance(node.func, ast.Attribute) and node.func.attr == name]


def data_splits(tree: ast.AST) -> list[ast.Call]:
    """The calls of `splitlines` on more than a message."""
    return [one for one in calls_of(tree, "splitlines") if not MESSAGES_OF_PROGRAMS.search(ast.unparse(one.func))]


def splits_lines(tree: ast.AST) -> bool:
    """Whether text is cut at line ends: by `splitlines`, or by `split` at a line end."""
    at_line_ends = [
        call
        for call in calls_of(tree, "split")
        if any(isinstance(one, ast.Constant) and one.value in ("\n", b"\n") for one in call.args)
    ]
    return bool(at_line_ends or data_splits(tree))


def test_json_lines_are_split_in_one_place() -> None:
    """`str.splitlines` cuts a JSON line at U+2028, which may stand in its text."""
    for file in sorted(PACKAGE.rglob("*.py")):
        name, tree = str(file.relative_to(PACKAGE)), ast.parse(file.read_text(encoding="utf-8"))
        for call in data_splits(tree) if file.parent.name in READS_DATA else ():
            assert name in SPLITTERS, f"{name}:{call.lineno}: take files.iter_lines for data"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and calls_of(node, "loads") and splits_lines(node):
                raise AssertionError(f"{name}:{node.lineno} splits JSON lines itself: take files.iter_lines")


def test_the_table_of_the_docs_is_the_schema() -> None:
    text = (PACKAGE.parent / "docs" / "rows.md").read_text(encoding="utf-8")
    start = text.index("| recipe | form |")
    assert text[start : text.index("\n\n", start)].split("\n") == describe_forms()
