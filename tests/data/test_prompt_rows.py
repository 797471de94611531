"""Rows as prompts: every form with a prompt, answers where there are any, all columns kept."""

from __future__ import annotations

from typing import Any

import pytest

from llm_quest.data.conversations import split_by_prompt
from llm_quest.data.document import DropReport
from llm_quest.data.prompt_rows import hash_of_rows, parse_prompt_row, read_prompt_rows
from llm_quest.data.records import Record
from llm_quest.data.row_forms import PROMPT_FORMS
from llm_quest.errors import DataError

USER = [{"role": "user", "content": "2+2?"}]


def row(**columns: Any):
    return parse_prompt_row(Record(columns, "rows.jsonl:3"))


@pytest.mark.parametrize(
    ("columns", "conversational"),
    [
        ({"prompt": "2+2?"}, False), ({"prompt": USER}, True), ({"question": "2+2?"}, False),
        ({"problem": "2+2?"}, False), ({"query": "2+2?"}, False), ({"instruction": "2+2?", "input": ""}, False),
        ({"messages": [*USER, {"role": "assistant", "content": "4"}]}, True), ({"messages": USER}, True),
        ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, True),
    ],
)  # fmt: skip
def test_every_form_gives_its_prompt(columns: dict[str, Any], conversational: bool):
    found = row(**columns)
    assert found.prompt == USER
    assert found.is_conversational == conversational
    assert found.columns == columns


def test_every_parser_is_tried_above():
    asked = {form.keys[0] for form in PROMPT_FORMS}
    assert asked == {"prompt", "messages", "conversations", "question", "problem", "query", "instruction"}


@pytest.mark.parametrize(
    ("columns", "answer"),
    [
        ({"answer": "4"}, "4"), ({"answer": 4}, "4"), ({"ground_truth": "6-2\n#### 4"}, "4"), ({}, None),
        ({"solution": r"so \boxed{4}"}, "4"), ({"answer": None, "solution": "4"}, "4"), ({"answer": 0}, "0"),
    ],
)  # fmt: skip
def test_the_answer_is_the_first_of_its_columns(columns: dict[str, Any], answer: str | None):
    assert row(prompt="2+2?", **columns).answer == answer


def test_a_system_column_is_the_system_message_unless_the_row_has_one():
    system = {"role": "system", "content": "Be short."}
    assert row(prompt="2+2?", system="Be short.").prompt == [system, *USER]
    assert row(prompt=[system, *USER], system="Be short.").prompt == [system, *USER]
    with pytest.raises(DataError, match="another system message"):
        row(prompt=[system, *USER], system="Be long.")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": "2+2?"}, r"rows.jsonl:3: has the keys text; expected those of one form: prompt; messages"),
        ({"prompt": 3}, "rows.jsonl:3: 'prompt' is a int, expected text"),
        ({"prompt": "a", "answer": [1]}, r"rows.jsonl:3: the answer is \[1\]"),
        ({"prompt": "a", "answer": True}, "the answer is True"),
        ({"prompt": "a", "completions": "b"}, "'completions', which rewards are given"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(columns: dict[str, Any], said: str):
    with pytest.raises(DataError, match=said):
        row(**columns)


def test_an_empty_prompt_is_dropped_and_counted():
    report = DropReport()
    found = read_prompt_rows([Record({"prompt": " "}, "a:1"), Record({"prompt": "b"}, "a:2")], report)
    assert [one.where for one in found] == ["a:2"]
    assert report.dropped["empty prompt"][0] == 1


def test_prompts_are_held_out_by_content():
    rows = [row(prompt=f"question {number % 20}", level=number) for number in range(100)]
    train, held = split_by_prompt(rows, 0.1)
    assert not {one.prompt[0]["content"] for one in train} & {one.prompt[0]["content"] for one in held}
    again = split_by_prompt([*rows[50:], *rows[:50]], 0.1)[1]
    assert {one.columns["level"] for one in again} == {one.columns["level"] for one in held}


def test_the_hash_knows_every_column():
    assert hash_of_rows([row(prompt="a", level=1)]) != hash_of_rows([row(prompt="a", level=2)])


def test_odd_rows_among_prompts_are_skipped_and_every_key_goes_to_the_rewards():
    report = DropReport()
    rows = [{"prompt": "a", "level": 3, "tools": "x"}, {"text": "b"}, {"prompt": "c", "answer": [1]}, {"prompt": 4}]
    found = read_prompt_rows([Record(one, f"a:{n}") for n, one in enumerate(rows, start=1)], report)
    assert [one.where for one in found] == ["a:1"]
    assert found[0].columns == rows[0]
    assert report.skipped.total() == 3
    assert not report.unused_keys
