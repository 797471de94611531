"""Preferences: answers to one question, the best first; usually two, chosen and rejected.

      {"prompt": ..., "chosen": ..., "rejected": ..., "margin": 1.0}      text or messages; the margin may be left out
      {"chosen": [messages], "rejected": [messages]}                      the prompt is what both begin with
      {"instruction": ..., "input": ..., "chosen": ..., "rejected": ...}
      {"prompt": ..., "ranked": [best, ..., worst]}

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
from llm_quest.data.conversations import Conversation, alpaca_prompt, check_role_order, message_field, parse_messages
from llm_quest.data.documents import DropReport
from llm_quest.data.messages import Message, to_messages
from llm_quest.data.records import Record
from llm_quest.data.template_sandbox import Messages
from llm_quest.errors import DataError


@dataclass(frozen=True)
class Preference:
    """question: messages, also given as pairs of role and content, the last one the user's. answers: the best first.
    margin: by how much the better one is better, in the reward's units. where: file:line. tools, weight: see
    `Conversation`."""

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
    for record in records:
        found = parse_preference(record)
        size = sum(len(one.content.encode()) for one in found.question) + sum(map(len, found.answers))
        if not all(answer.strip() for answer in found.answers):
            drop_report.drop("empty answer", size)
        elif any(better.strip() == worse.strip() for better, worse in pairwise(found.answers)):
            drop_report.drop("chosen and rejected are the same", size)
        else:
            drop_report.keep(size)
            kept.append(found)
    return kept


def parse_preference(record: Record) -> Preference:
    """Parse one row. DataError with file and line where it is no preference."""
    row, where = record.row, record.where
    if "ranked" in row:
        question, answers = prompt_messages(record), parse_ranked_answers(record)
    elif "chosen" in row and "rejected" in row:
        whole = [message_field(record, key, "assistant") for key in ("chosen", "rejected")]
        question = prompt_messages(record) if "prompt" in row or "instruction" in row else shared_prompt(whole, where)
        answers = tuple(answer_text(one, len(question), where) for one in whole)
    else:
        raise DataError(f"{where} has the keys {', '.join(map(str, row)) or '(none)'}; expected chosen and rejected")
    check_role_order([*question, ("assistant", answers[0])], where)
    return Preference(tuple(question), answers, parse_margin(record), where)


def prompt_messages(record: Record) -> list[tuple[str, str]]:
    if "prompt" in record.row:
        return message_field(record, "prompt", "user")
    if "instruction" in record.row:
        return alpaca_prompt(record)
    raise DataError(f"{record.where} has no prompt and no instruction")


def shared_prompt(whole: Sequence[list[tuple[str, str]]], where: str) -> list[tuple[str, str]]:
    """The messages with which both conversations begin."""
    chosen, rejected = whole
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise DataError(f"{where}: chosen and rejected do not begin with the same question; give it as prompt")
    return chosen[:-1]


def answer_text(one: list[tuple[str, str]], before: int, where: str) -> str:
    """The text of the last message, which must be the assistant's and the only one after the question."""
    role, content = one[-1] if one else ("", "")
    if role != "assistant" or len(one) not in (1, before + 1):
        raise DataError(f"{where}: an answer is one message of the assistant; got {len(one)}, the last by {role!r}")
    return content


def parse_ranked_answers(record: Record) -> tuple[str, ...]:
    """At least two answers, the best first."""
    found = record.row["ranked"]
    if not isinstance(found, list) or len(found) < 2:
        raise DataError(f"{record.where}: 'ranked' is no list of two answers or more")
    if all(isinstance(one, str) for one in found):
        return tuple(found)
    whole = [parse_messages(one, record.where) for one in found]
    return tuple(answer_text(one, len(prompt_messages(record)), record.where) for one in whole)


def parse_margin(record: Record) -> float:
    value = record.row.get("margin", 0.0)
    try:
        margin = float(value)
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise DataError(f"{record.where}: 'margin' is {value!r}, expected a number")
    return margin


def tokenize_preferences(
    chat_template: ChatTemplate, preferences: Sequence[Preference], max_length: int, drop_report: DropReport
) -> list[TokenizedPreference]:
    """Preferences as ids, in rows of at most `max_length`. DataError where nothing is left."""
    encoded = iter(chat_template.encode_last_answers([text for one in preferences for text in one.to_conversations()]))
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
    size = min(one.last_answer_span[0] for one in examples)
    first, *others = (one.input_ids[:size] for one in examples)
    size = min((int(np.argmin(np.append(first == other, False))) for other in others), default=size)
    return first[:size], tuple(one.input_ids[size : one.last_answer_span[1]] for one in examples)
