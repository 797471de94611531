"""Prompts from rows: what a policy is asked, an answer to check it by where there is one, and every column for rewards.

      {"prompt": ..., "answer": ...}   (text or messages)        {"question": ..., "answer": "... #### 72"}
      {"messages": [...], ...}  up to the last answer            {"instruction": ..., "input": ...}

The answer is `answer`, `ground_truth` or `solution`, whichever comes first, as text or a number. A `system` column is
the system message of its row; `tools` are the functions that the chat template shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_quest.data.conversation_forms import ANSWER_KEYS, CHAT_KEYS
from llm_quest.data.document import DropReport
from llm_quest.data.message_parsing import parse_tools, read_spelled_messages
from llm_quest.data.problems.answer_forms import gold_answer
from llm_quest.data.problems.problem import Problem
from llm_quest.data.records import Record, TrackedRow, parse_rows
from llm_quest.data.row_forms import PROMPT_FORMS, select_form
from llm_quest.data.template_sandbox import Messages
from llm_quest.errors import RowError

RESERVED_COLUMNS = ("prompts", "completions", "completion_ids")
"""What a reward function is given besides the columns."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and what its row says of the answer. prompt: messages, the last one the user's (or a tool's). answer:
    None where the row has none. is_conversational: the row held messages. columns: all of its keys. where: file:line.
    weight: how often it is seen in an epoch. tools: functions that may be called."""

    prompt: Messages
    answer: str | None
    is_conversational: bool
    columns: Mapping[str, Any]
    where: str = ""
    weight: float = 1.0
    tools: tuple[Mapping[str, Any], ...] = ()

    def to_problem(self, answer_form: str, grading: str) -> Problem:
        """The row as a problem of the verifier `equal`."""
        return Problem(
            prompt="\n".join(message["content"] for message in self.prompt),
            answer=self.answer or "",
            verifier="equal",
            key=json.dumps(self.prompt),
            answer_form=answer_form,
            grading=grading,
            messages=tuple(self.prompt),
            is_conversational=self.is_conversational,
            columns=self.columns,
            tools=self.tools,
        )


def read_prompt_rows(records: Iterable[Record], drop_report: DropReport) -> list[PromptRow]:
    """The rows with a prompt; the report counts those whose prompt is empty, and rows of no known form."""
    kept = []
    for row in parse_rows(records, parse_prompt_row, drop_report):
        size = sum(len(message["content"].encode()) for message in row.prompt)
        if not row.prompt or not row.prompt[-1]["content"].strip():
            drop_report.drop("empty prompt", size)
        else:
            drop_report.keep(size)
            kept.append(row)
    return kept


def parse_prompt_row(record: Record) -> PromptRow:
    """Parse one row, by the first of the forms whose key it has. RowError where it has none."""
    row, where = TrackedRow.wrap(record.row), record.where
    form = select_form(PROMPT_FORMS, row, where)
    if reserved := [name for name in RESERVED_COLUMNS if name in row]:
        reason = f"a column cannot be called {reserved[0]!r}, which rewards are given; rename it"
        raise RowError(where, f"a column {reserved[0]!r}", reason)
    messages = [one.as_dict() for one in form.parse(row, where)]
    if messages and messages[-1]["role"] not in ("user", "tool"):
        reason = f"the prompt's last message is by {messages[-1]['role']!r}; expected the user's, or a tool's"
        raise RowError(where, "roles out of order", reason)
    row.read.update(row)  # rewards are given all columns
    is_conversational = form.keys[0] in CHAT_KEYS or isinstance(read_spelled_messages(row[form.keys[0]], where), list)
    given = row.get("tools", ())  # text is a column of rewards alone, and so is `functions`
    tools = () if is_plain_text(given) else parse_tools({"tools": given}, where)
    return PromptRow(messages, parse_answer(row, where), is_conversational, row, where, record.weight, tools)


def is_plain_text(value: Any) -> bool:
    return isinstance(value, str) and not value.lstrip().startswith("[")


def parse_answer(row: Mapping[str, Any], where: str) -> str | None:
    """The final answer of a row; None where it has no such column, or null in it."""
    value = next((row[name] for name in ANSWER_KEYS if row.get(name) not in (None, "")), None)
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise RowError(where, "an answer of another kind", f"the answer is {value!r:.60}; expected text or a number")
    return None if value is None else gold_answer(str(value))


def hash_of_rows(rows: Sequence[PromptRow]) -> str:
    """sha256 of all prompts, answers and columns."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt, row.answer, dict(row.columns)], default=str).encode() + b"\n")
    return digest.hexdigest()
