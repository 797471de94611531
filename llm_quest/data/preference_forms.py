"""Forms of preferences: a question with a chosen and a rejected answer, or with answers from the best to the worst."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from llm_quest.data.conversation_forms import (
    CHAT_KEYS,
    COMMON_KEYS,
    SHAREGPT_TURNS,
    Row,
    RowForm,
    begin_turns,
    join_turns,
    parse_chat,
    question_turns,
)
from llm_quest.data.message_parsing import (
    parse_messages,
    parse_transcript,
    read_cell,
    read_spelled_messages,
    text_or_messages,
)
from llm_quest.data.messages import Message
from llm_quest.errors import RowError


class PreferenceParts(NamedTuple):
    """A question and its answers, the best first."""

    question: list[Message]
    answers: tuple[str, ...]


def parse_choice(row: Row, where: str, question_key: str) -> PreferenceParts:
    """A question with a chosen and a rejected answer."""
    chat = question_key in CHAT_KEYS
    question = parse_chat(row, where, question_key) if chat else question_turns(row, where, question_key)
    whole = [text_or_messages(row, key, "assistant", where, extra=False) for key in ("chosen", "rejected")]
    return PreferenceParts(question, tuple(answer_text(one, question, where) for one in whole))


def parse_whole_choice(row: Row, where: str) -> PreferenceParts:
    """Two whole conversations, as messages or transcripts: the question is what both begin with."""
    chosen, rejected = (parse_whole_conversation(row, key, where) for key in ("chosen", "rejected"))
    whole = (chosen, rejected)
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        reason = "chosen and rejected do not begin with the same question; give it as prompt"
        raise RowError(where, "no common question", reason)
    question = join_turns(begin_turns(row, where), chosen[:-1], where)
    return PreferenceParts(question, tuple(answer_text(one[-1:], question, where) for one in whole))


def parse_whole_conversation(row: Row, key: str, where: str) -> list[Message]:
    """A conversation as messages or as a transcript."""
    value = read_spelled_messages(row[key], where)
    if isinstance(value, str):
        return parse_transcript(value, where)
    return parse_messages(row, key, where, value=value, extra=False)


def parse_ranking(row: Row, where: str, question_key: str, key: str) -> PreferenceParts:
    """A question with two answers or more, the best first."""
    question, cell = question_turns(row, where, question_key), read_cell(row, key, where)
    if not isinstance(cell, list) or len(cell) < 2:
        raise RowError(where, f"{key} of another form", f"{key!r} is no list of two answers or more")
    if all(isinstance(one, str) for one in cell):
        return PreferenceParts(question, tuple(cell))
    whole = [parse_messages(row, key, where, value=one, extra=False) for one in cell]
    return PreferenceParts(question, tuple(answer_text(one, question, where) for one in whole))


def answer_text(one: list[Message], question: list[Message], where: str) -> str:
    """The text of the last message, which must be the assistant's; what stands before it must be the question."""
    if not one or one[-1].role != "assistant":
        last = one[-1].role if one else ""
        reason = f"an answer is one message of the assistant; got {len(one)}, the last by {last!r}"
        raise RowError(where, "no answer", reason)
    spoken = [message for message in one[:-1] if message.role != "system"]
    turns = [message for message in question if message.role != "system"]
    if spoken and [(m.role, m.content) for m in spoken] != [(m.role, m.content) for m in turns]:
        raise RowError(where, "answers to another question", "chosen or rejected answers another question than prompt")
    return one[-1].content


def choice_form(question_key: str, name: str, *optional: str) -> RowForm:
    example = {
        question_key: SHAREGPT_TURNS[:1] if question_key in CHAT_KEYS else "2+2?",
        "chosen": "4",
        "rejected": "5",
    }
    keys = (question_key, "chosen", "rejected")
    return RowForm(
        name, keys, partial(parse_choice, question_key=question_key), example, (*optional, "margin", *COMMON_KEYS)
    )


def ranking_form(question_key: str, key: str, name: str, *optional: str) -> RowForm:
    parse, example = (
        partial(parse_ranking, question_key=question_key, key=key),
        {question_key: "2+2?", key: ["4", "5", "6"]},
    )
    return RowForm(name, (question_key, key), parse, example, (*optional, "margin", *COMMON_KEYS))


PREFERENCE_FORMS = (
    ranking_form("prompt", "ranked", "ranked answers, the best first"),
    ranking_form("instruction", "ranked", "ranked answers to an instruction", "input"),
    choice_form("prompt", "prompt, chosen, rejected (TRL; text or messages)"),
    choice_form("messages", "messages with a chosen and a rejected answer"),
    choice_form("conversations", "LLaMA-Factory's ranking"),
    choice_form("question", "orca pairs"),
    choice_form("query", "query, chosen, rejected"),
    choice_form("instruction", "instruction, chosen, rejected", "input"),
    RowForm(
        "chosen and rejected alone: whole conversations, or hh-rlhf's text",
        ("chosen", "rejected"),
        parse_whole_choice,
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        ("margin", *COMMON_KEYS),
    ),
    ranking_form("instruction", "output", "Alpaca with a list of outputs, the best first", "input"),
)
