"""Forms of conversations: rows with messages, or with a question and an answer; the same rated, and prompts alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from llm_quest.data.message_parsing import parse_messages, read_cell, text_field, text_or_messages
from llm_quest.data.messages import Message
from llm_quest.errors import RowError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowForm:
    """A form of rows, told by its keys. keys: those that every row of the form has. optional: further keys that it
    reads. parse(row, where): its content."""

    name: str
    keys: tuple[str, ...]
    parse: Callable[[Row, str], Any]
    example: Row
    optional: tuple[str, ...] = ()


COMMON_KEYS = ("system", "history", "tools")
CHAT_KEYS = ("messages", "conversations", "conversation")


def begin_turns(row: Row, where: str) -> list[Message]:
    """The system message and the earlier turns (pairs of question and answer) that stand beside the others."""
    system = text_field(row, "system", where)
    turns = [Message("system", system)] if system.strip() else []
    history = read_cell(row, "history", where) if row.get("history") else []
    if not isinstance(history, list) or any(not is_text_pair(pair) for pair in history):
        raise RowError(where, "history of another form", "history is no list of pairs [question, answer]")
    for question, answer in history:
        turns += [Message("user", question), Message("assistant", answer)]
    return turns


def is_text_pair(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(one, str) for one in pair)


def join_turns(before: list[Message], turns: list[Message], where: str) -> list[Message]:
    """Earlier turns and these. RowError for two system messages that differ."""
    systems = [one for one in (*before, *turns) if one.role == "system"]
    if len(systems) < 2 or not before:
        return [*before, *turns]
    if len({system.content.strip() for system in systems}) > 1:
        raise RowError(where, "two system messages", "has a key system and another system message in its messages")
    return [*before, *(turn for turn in turns if turn.role != "system")]


def instruction_text(row: Row, where: str) -> str:
    """An instruction with its input (Alpaca) or context (Dolly) below it."""
    parts = (text_field(row, key, where).strip() for key in ("instruction", "input", "context"))
    return "\n\n".join(part for part in parts if part)


def question_turns(row: Row, where: str, key: str) -> list[Message]:
    """What is asked under a key, with what stands before it."""
    question = (
        [Message("user", instruction_text(row, where))]
        if key == "instruction"
        else text_or_messages(row, key, "user", where)
    )
    return join_turns(begin_turns(row, where), question, where)


def parse_chat(row: Row, where: str, key: str) -> list[Message]:
    return join_turns(begin_turns(row, where), parse_messages(row, key, where), where)


def parse_pair(row: Row, where: str, question_key: str, answer_key: str) -> list[Message]:
    return [*question_turns(row, where, question_key), *text_or_messages(row, answer_key, "assistant", where)]


def chat_form(key: str, name: str, turns: Sequence[Mapping[str, str]]) -> RowForm:
    return RowForm(name, (key,), partial(parse_chat, key=key), {key: turns}, COMMON_KEYS)


def pair_form(question_key: str, answer_key: str, name: str, *optional: str) -> RowForm:
    parse = partial(parse_pair, question_key=question_key, answer_key=answer_key)
    return RowForm(
        name, (question_key, answer_key), parse, {question_key: "2+2?", answer_key: "4"}, (*optional, *COMMON_KEYS)
    )


OPENAI_TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
SHAREGPT_TURNS = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]

CONVERSATION_FORMS = (
    chat_form("messages", "messages (OpenAI, TRL)", OPENAI_TURNS),
    chat_form("conversations", "conversations (ShareGPT)", SHAREGPT_TURNS),
    chat_form("conversation", "conversation", OPENAI_TURNS),
    pair_form("prompt", "completion", "prompt and completion (TRL; text or messages)"),
    pair_form("prompt", "response", "prompt and response"),
    pair_form("query", "response", "query and response"),
    pair_form("question", "answer", "question and answer"),
    pair_form("question", "response", "question and response"),
    pair_form("instruction", "output", "Alpaca", "input"),
    pair_form("instruction", "response", "Dolly", "context", "input"),
)


class RatedParts(NamedTuple):
    """A conversation whose last answer is good or not."""

    messages: list[Message]
    desirable: bool


ANSWER_KEYS = ("answer", "ground_truth", "solution")
"""Where the answer of a prompt stands that a reward may check."""


def parse_prompt(row: Row, where: str, key: str) -> list[Message]:
    """A prompt, or a conversation without the answer that it ends with."""
    turns = parse_chat(row, where, key) if key in CHAT_KEYS else question_turns(row, where, key)
    return turns[:-1] if turns and turns[-1].role == "assistant" else turns


def prompt_form(key: str, name: str, *optional: str) -> RowForm:
    example = {key: SHAREGPT_TURNS if key in CHAT_KEYS else "2+2?", "answer": "4"}
    keys = (*optional, *ANSWER_KEYS, *COMMON_KEYS)
    return RowForm(name, (key,), partial(parse_prompt, key=key), example, keys)


PROMPT_FORMS = (
    prompt_form("prompt", "prompt (text or messages)"),
    prompt_form("messages", "messages, up to the last answer"),
    prompt_form("conversations", "conversations, up to the last answer"),
    prompt_form("question", "question"),
    prompt_form("problem", "problem"),
    prompt_form("query", "query"),
    prompt_form("instruction", "instruction", "input", "context"),
)
"""Prompts of GRPO; every further key goes to the rewards."""

TRUE_WORDS, FALSE_WORDS = ("true", "1", "yes", "good"), ("false", "0", "no", "bad")


def parse_rating(row: Row, where: str, form: RowForm, key: str) -> RatedParts:
    """A conversation of another form, with a key that rates its answer."""
    given = row[key]
    value = str(int(given) if isinstance(given, float) and given in (0, 1) else given).strip().lower()
    if value not in TRUE_WORDS + FALSE_WORDS:
        raise RowError(where, f"{key} of another form", f"{key!r} is {given!r:.40}, expected true or false")
    return RatedParts(form.parse(row, where), value in TRUE_WORDS)


def rated_form(form: RowForm, key: str) -> RowForm:
    parse = partial(parse_rating, form=form, key=key)
    return RowForm(f"{form.name}, rated", (*form.keys, key), parse, {**form.example, key: True}, form.optional)


RATED_FORMS = tuple(rated_form(form, key) for form in CONVERSATION_FORMS for key in ("label", "kto_tag"))
"""KTO's rows: any conversation with `label` (TRL) or `kto_tag` (LLaMA-Factory)."""
