"""Preferences: answers to one question, the best first; usually two, chosen and rejected.

      {"prompt": ..., "chosen": ..., "rejected": ..., "margin": 1.0}      further forms: `data/row_forms.py`

Commonly got wrong: (1) answers are cut at the row's end, and one that was cut to nothing makes NaN; here the question
is cut, on its left and alike for all answers, and where an answer alone is too long its row is dropped and counted.
(2) Two equal answers carry no information and dilute every mean: dropped and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from llm_quest.data.chat import ChatExample, ChatTemplate
from llm_quest.data.conversations import Conversation, check_role_order
from llm_quest.data.document import DropReport
from llm_quest.data.message_parsing import parse_tools
from llm_quest.data.messages import Message, to_messages
from llm_quest.data.records import Record, TrackedRow, parse_rows
from llm_quest.data.row_forms import PREFERENCE_FORMS, select_form
from llm_quest.data.template_sandbox import Messages
from llm_quest.errors import DataError, RowError


@dataclass(frozen=True)
class Preference:
    """A question with ranked answers. question: messages, also given as pairs of role and content, the last one the
    user's. answers: the best first. margin: by how much the better one is better, in the reward's units. where:
    file:line. tools, weight: see `Conversation`."""

    question: tuple[Message, ...]
    answers: tuple[str, ...]
    margin: float = 0.0
    where: str = ""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", to_messages(self.question))

    @property
    def prompt(self) -> Messages:
        """The question as chat templates take it."""
        return [one.as_dict() for one in self.question]

    def to_conversations(self) -> list[Conversation]:
        """The question with each answer."""
        return [
            Conversation((*self.question, Message("assistant", answer)), self.where, self.tools)
            for answer in self.answers
        ]


@dataclass(frozen=True, eq=False)
class TokenizedPreference:
    """A preference as ids. prompt (P,); answers: (A,) each, with their ends."""

    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]
    margin: float = 0.0
    where: str = ""

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return len(self.prompt) + max(map(len, self.answers))


def read_preferences(records: Iterable[Record], drop_report: DropReport) -> list[Preference]:
    """The preferences that can be learned from; the report counts what was dropped."""
    kept = []
    for preference in parse_rows(records, parse_preference, drop_report):
        size = sum(len(one.content.encode()) for one in preference.question) + sum(map(len, preference.answers))
        if not all(answer.strip() for answer in preference.answers):
            drop_report.drop("empty answer", size)
        elif any(better.strip() == worse.strip() for better, worse in pairwise(preference.answers)):
            drop_report.drop("chosen and rejected are the same", size)
        else:
            drop_report.keep(size)
            kept.append(preference)
    return kept


def parse_preference(record: Record) -> Preference:
    """Parse one row. RowError with file and line where it is no preference."""
    row, where = TrackedRow.wrap(record.row), record.where
    question, answers = select_form(PREFERENCE_FORMS, row, where).parse(row, where)
    check_role_order([*question, Message("assistant", answers[0])], where)
    return Preference(tuple(question), answers, parse_margin(row, where), where, parse_tools(row, where), record.weight)


def parse_margin(row: TrackedRow, where: str) -> float:
    value = row.get("margin", 0.0)
    value = 0.0 if value == "" else value  # an empty cell of a table
    try:
        margin = float(value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        raise RowError(where, "margin of another form", f"'margin' is {value!r:.60}, expected a number")
    return margin


def tokenize_preferences(
    chat_template: ChatTemplate, preferences: Sequence[Preference], max_length: int, drop_report: DropReport
) -> list[TokenizedPreference]:
    """Preferences as ids, in rows of at most `max_length`. DataError where nothing is left."""
    encoded = iter(
        chat_template.encode_last_answers(
            [text for preference in preferences for text in preference.to_conversations()]
        )
    )
    kept, cut, refused = [], 0, ""
    for one in preferences:
        answers = [next(encoded) for _ in one.answers]
        if error := next((answer.error for answer in answers if answer.error), ""):
            refused = refused or f"{one.where}: {error}"
            drop_report.drop(f"refused by the chat template: {error}", 0)
            continue
        prompt, completions = split_at_shared_prompt([answer.examples[0] for answer in answers])
        room = max_length - max(map(len, completions))
        if room < 1 or not len(prompt):
            drop_report.drop(f"an answer alone is longer than a row of {max_length} tokens", 0)
            continue
        if len(prompt) > room:
            cut += 1
        kept.append(TokenizedPreference(prompt[-room:], completions, one.margin, one.where))
    if cut:
        drop_report.note(f"{cut} questions are cut on their left to fit into {max_length} tokens with their answers")
    if preferences and not kept:
        raise DataError(refused or f"no answer fits into {max_length} tokens beside a question; raise sequence_length")
    return kept


def split_at_shared_prompt(examples: Sequence[ChatExample]) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The ids that all answers follow, and each answer's. Commonly got wrong: of a reasoning model one answer may
    follow `<think>` and another not; the prompt is then what both follow."""
    size = min(example.last_answer_span[0] for example in examples)
    first, *others = (example.input_ids[:size] for example in examples)
    size = min((int(np.argmin(np.append(first == other, False))) for other in others), default=size)
    return first[:size], tuple(example.input_ids[size : example.last_answer_span[1]] for example in examples)
