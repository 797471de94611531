"""Prompts from rows: what a policy is asked, an answer to check it by where there is one, and every column for rewards.

      {"prompt": ..., "answer": ...}   (text or messages)        {"question": ..., "answer": "... #### 72"}
      {"messages": [...], ...}  up to the last answer            {"instruction": ..., "input": ...}

The answer is `answer`, `ground_truth` or `solution`, whichever comes first, as text or a number. A `system` column is
the system message of its row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_quest.data.conversations import alpaca_prompt, message_field, parse_messages, text_field
from llm_quest.data.documents import DropReport
from llm_quest.data.problems.answer_forms import gold_answer
from llm_quest.data.problems.problem import Problem
from llm_quest.data.records import Record
from llm_quest.data.template_sandbox import Messages
from llm_quest.errors import DataError

ANSWER_COLUMNS = ("answer", "ground_truth", "solution")
RESERVED_COLUMNS = ("prompts", "completions", "completion_ids")
"""What a reward function is given besides the columns."""
Turns = list[tuple[str, str]]


@dataclass(frozen=True)
class PromptRow:
    """prompt: messages, the last one the user's (or a tool's). answer: None where the row has none. is_conversational:
    the row held messages. columns: all of its keys. where: file:line."""

    prompt: Messages
    answer: str | None
    is_conversational: bool
    columns: Mapping[str, Any]
    where: str = ""

    def to_problem(self, answer_form: str, grading: str) -> Problem:
        """As a problem of the verifier `equal`."""
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
        )


def read_prompt_rows(records: Iterable[Record], drop_report: DropReport) -> list[PromptRow]:
    """The rows with a prompt; the report counts those whose prompt is empty. DataError for a row of no known form."""
    kept = []
    for record in records:
        row = parse_prompt_row(record)
        size = sum(len(message["content"].encode()) for message in row.prompt)
        if not row.prompt or not row.prompt[-1]["content"].strip():
            drop_report.drop("empty prompt", size)
        else:
            drop_report.keep(size)
            kept.append(row)
    return kept


def parse_prompt_row(record: Record) -> PromptRow:
    """Parse one row, by the first of the forms whose key it has."""
    for key, form in PROMPT_PARSERS.items():
        if key in record.row:
            turns = form(record)
            break
    else:
        raise DataError(
            f"{record.where} has the keys {', '.join(map(str, record.row)) or '(none)'}; expected one of "
            f"{', '.join(PROMPT_PARSERS)}"
        )
    if found := [name for name in RESERVED_COLUMNS if name in record.row]:
        raise DataError(f"{record.where}: a column cannot be called {found[0]!r}, which rewards are given; rename it")
    if "system" in record.row and turns and turns[0][0] != "system":
        turns = [("system", text_field(record, "system")), *turns]
    messages = [{"role": role, "content": content} for role, content in turns]
    return PromptRow(messages, parse_answer(record), isinstance(record.row[key], list), record.row, record.where)


def up_to_last_answer(turns: Turns) -> Turns:
    """A conversation without the answer that it ends with."""
    return turns[:-1] if turns and turns[-1][0] == "assistant" else turns


PROMPT_PARSERS: dict[str, Callable[[Record], Turns]] = {
    "prompt": lambda record: message_field(record, "prompt", "user"),
    "messages": lambda record: up_to_last_answer(parse_messages(record.row["messages"], record.where)),
    "conversations": lambda record: up_to_last_answer(
        parse_messages(record.row["conversations"], record.where, "from", "value")
    ),
    "question": lambda record: [("user", text_field(record, "question"))],
    "problem": lambda record: [("user", text_field(record, "problem"))],
    "query": lambda record: [("user", text_field(record, "query"))],
    "instruction": alpaca_prompt,
}
"""Column -> how the prompt is read from it."""


def parse_answer(record: Record) -> str | None:
    """The final answer of a row; None where it has no such column, or null in it."""
    value = next((record.row[name] for name in ANSWER_COLUMNS if record.row.get(name) is not None), None)
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise DataError(f"{record.where}: the answer is {value!r:.60}; expected text or a number")
    return None if value is None else gold_answer(str(value))


def hash_of_rows(rows: Sequence[PromptRow]) -> str:
    """sha256 of all prompts, answers and columns."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt, row.answer, dict(row.columns)], default=str).encode() + b"\n")
    return digest.hexdigest()
