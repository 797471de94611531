"""Preferences: answers to one question, the best first; usually two, chosen and rejected.

      {"prompt": ..., "chosen": ..., "rejected": ..., "margin": 1.0}      text or messages; the margin may be left out
      {"chosen": [messages], "rejected": [messages]}                      the prompt is what both begin with
      {"instruction": ..., "input": ..., "chosen": ..., "rejected": ...}
      {"prompt": ..., "ranked": [best, ..., worst]}

Commonly got wrong: (1) answers are cut at the row's end, and one that was cut to nothing makes NaN; here the question
is cut, on its left and alike for all answers, and where an answer alone is too long its row is dropped and counted.
(2) Two answers that are the same tell nothing and dilute every mean: dropped and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from llm_quest.data.chat import Chat
from llm_quest.data.conversations import Conversation, asked, messages, require_order, said
from llm_quest.data.documents import Ledger
from llm_quest.data.records import Record
from llm_quest.data.template import Messages
from llm_quest.errors import DataError


@dataclass(frozen=True)
class Preference:
    """question: (role, content) each, the last one the user's. answers: the best first. margin: by how much the better
    one is better, in the reward's units. where: file:line."""

    question: tuple[tuple[str, str], ...]
    answers: tuple[str, ...]
    margin: float = 0.0
    where: str = ""

    @property
    def prompt(self) -> Messages:
        """As templates take them."""
        return [{"role": role, "content": content} for role, content in self.question]

    def talk(self) -> list[Conversation]:
        """The question with each answer."""
        return [Conversation((*self.question, ("assistant", answer)), self.where) for answer in self.answers]


@dataclass(frozen=True, eq=False)
class Rated:
    """A preference as ids. prompt (P,); answers: (A,) each, with their ends."""

    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]
    margin: float = 0.0
    where: str = ""

    @property
    def size(self) -> int:
        """Ids of the longest row."""
        return len(self.prompt) + max(map(len, self.answers))


def preferences(records: Iterable[Record], ledger: Ledger) -> list[Preference]:
    """What tells something; the ledger says what was dropped."""
    kept = []
    for record in records:
        found = preference(record)
        size = sum(len(content.encode()) for _, content in found.question) + sum(map(len, found.answers))
        if not all(answer.strip() for answer in found.answers):
            ledger.drop("empty answer", size)
        elif any(better.strip() == worse.strip() for better, worse in pairwise(found.answers)):
            ledger.drop("chosen and rejected are the same", size)
        else:
            ledger.keep(size)
            kept.append(found)
    return kept


def preference(record: Record) -> Preference:
    """One row. DataError with file and line where it is none."""
    row, where = record.row, record.where
    if "ranked" in row:
        question, answers = asked_in(record), ranked(record)
    elif "chosen" in row and "rejected" in row:
        whole = [said(record, key, "assistant") for key in ("chosen", "rejected")]
        question = asked_in(record) if "prompt" in row or "instruction" in row else shared(whole, where)
        answers = tuple(answer(one, len(question), where) for one in whole)
    else:
        raise DataError(f"{where} has the keys {', '.join(map(str, row)) or '(none)'}; expected chosen and rejected")
    require_order([*question, ("assistant", answers[0])], where)
    return Preference(tuple(question), answers, margin_of(record), where)


def asked_in(record: Record) -> list[tuple[str, str]]:
    if "prompt" in record.row:
        return said(record, "prompt", "user")
    if "instruction" in record.row:
        return asked(record)
    raise DataError(f"{record.where} has no prompt and no instruction")


def shared(whole: Sequence[list[tuple[str, str]]], where: str) -> list[tuple[str, str]]:
    """What both conversations begin with."""
    chosen, rejected = whole
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise DataError(f"{where}: chosen and rejected do not begin with the same question; give it as prompt")
    return chosen[:-1]


def answer(one: list[tuple[str, str]], before: int, where: str) -> str:
    """The last message, which must be the assistant's and the only one after the question."""
    role, content = one[-1] if one else ("", "")
    if role != "assistant" or len(one) not in (1, before + 1):
        raise DataError(f"{where}: an answer is one message of the assistant; got {len(one)}, the last by {role!r}")
    return content


def ranked(record: Record) -> tuple[str, ...]:
    """At least two answers, the best first."""
    found = record.row["ranked"]
    if not isinstance(found, list) or len(found) < 2:
        raise DataError(f"{record.where}: 'ranked' is no list of two answers or more")
    if all(isinstance(one, str) for one in found):
        return tuple(found)
    whole = [messages(one, record.where) for one in found]
    return tuple(answer(one, len(asked_in(record)), record.where) for one in whole)


def margin_of(record: Record) -> float:
    value = record.row.get("margin", 0.0)
    try:
        margin = float(value)
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise DataError(f"{record.where}: 'margin' is {value!r}, expected a number")
    return margin


def rated(chat: Chat, found: Sequence[Preference], length: int, ledger: Ledger) -> list[Rated]:
    """As ids, in rows of at most `length`. DataError where nothing is left."""
    examples = iter(chat.examples([one for preference in found for one in preference.talk()]))
    kept, cut = [], 0
    for one in found:
        pieces = []
        for _ in one.answers:
            example = next(examples)
            begin, end = example.last
            pieces.append((example.ids[:begin], example.ids[begin:end]))
        answers = tuple(answer for _, answer in pieces)
        room = length - max(map(len, answers))
        prompt = pieces[0][0]
        if room < 1 or not len(prompt):
            ledger.drop(f"an answer alone is longer than a row of {length} tokens", 0)
            continue
        if len(prompt) > room:
            cut += 1
        kept.append(Rated(prompt[-room:], answers, one.margin, one.where))
    if cut:
        ledger.note(f"{cut} questions are cut on their left to fit into {length} tokens with their answers")
    if found and not kept:
        raise DataError(f"no answer fits into {length} tokens beside a question; raise batch.length")
    return kept
