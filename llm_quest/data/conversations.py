"""Conversations: rows of instruction data as messages with roles, the last of them the assistant's.

A row of no known form (`data/row_forms.py`), or whose roles are out of order, is skipped and counted, with file and
line. So is an empty answer: it would train the model to say nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from llm_quest.data.document import DropReport
from llm_quest.data.message_parsing import parse_tools
from llm_quest.data.messages import Message, to_messages
from llm_quest.data.records import Record, TrackedRow, parse_rows
from llm_quest.data.row_forms import CONVERSATION_FORMS, select_form
from llm_quest.data.template_sandbox import Messages
from llm_quest.errors import DataError, RowError, UsageError


@dataclass(frozen=True)
class Conversation:
    """A conversation that is trained on. messages: also given as pairs of role and content. tools: the functions that
    the assistant may call, as JSON schemas for the chat template. weight: how often it is seen in an epoch. where:
    file:line."""

    messages: tuple[Message, ...]
    where: str = ""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", to_messages(self.messages))

    @property
    def message_dicts(self) -> Messages:
        """Messages as chat templates take them."""
        return [message.as_dict() for message in self.messages]

    @property
    def prompt(self) -> Messages:
        """All messages but the last answer."""
        return self.message_dicts[:-1]

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.messages[-1].content

    @property
    def hash(self) -> str:
        """sha256 of all messages."""
        return hashlib.sha256(repr(self.messages).encode()).hexdigest()


def read_conversations(records: Iterable[Record], drop_report: DropReport) -> list[Conversation]:
    """The conversations that can be learned from; the report counts what was dropped."""
    kept = []
    for conversation in parse_rows(records, parse_conversation, drop_report):
        size = sum(len(message.content.encode()) for message in conversation.messages)
        if not conversation.answer.strip() and "tool_calls" not in conversation.messages[-1].extra:
            drop_report.drop("empty answer", size)
        elif not any(message.is_learned for message in conversation.messages):
            drop_report.drop("no message is to be learned", size)
        else:
            drop_report.keep(size)
            kept.append(conversation)
    return kept


def parse_conversation(record: Record) -> Conversation:
    """Parse one row, by the first of the forms whose keys it has. RowError with file and line where it is none."""
    row, where = TrackedRow.wrap(record.row), record.where
    messages = select_form(CONVERSATION_FORMS, row, where).parse(row, where)
    return build_conversation(messages, row, record)


def build_conversation(messages: Sequence[Message], row: TrackedRow, record: Record) -> Conversation:
    """A conversation up to its last answer, with the tools of its row."""
    last = max((n for n, message in enumerate(messages, start=1) if message.role == "assistant"), default=len(messages))
    if last < len(messages):
        row.left_out.add("(messages after the last answer)")
    check_role_order(messages[:last], record.where)
    return Conversation(tuple(messages[:last]), record.where, parse_tools(row, record.where), record.weight)


TURN_ORDER = re.compile(r"s?(u(at+)*a)+")
"""The roles of a conversation by their first letters."""


def check_role_order(messages: Sequence[Message], where: str) -> None:
    """Check the roles: perhaps a system message, then user and assistant in turn, the assistant last. Between them the
    assistant may call tools, whose answers it then continues from."""
    roles = [message.role for message in messages]
    if not TURN_ORDER.fullmatch("".join(role[0] for role in roles)):
        raise RowError(
            where, "roles out of order",
            f"the roles are {', '.join(roles) or '(none)'}; expected an optional system message, then user and "
            "assistant in turn, with the assistant last; tools answer the assistant",
        )  # fmt: skip


class HasPrompt(Protocol):
    """Anything with a prompt."""

    @property
    def prompt(self) -> Messages: ...


Item = TypeVar("Item", bound=HasPrompt)


def split_by_prompt(items: Sequence[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """(training, held out): about `held_out` of the items, chosen by the hash of their first question, so that the
    same question with other answers is never on both sides, no seed is needed, and a new row moves few others.

    Commonly got wrong: the rows of a conversation tree begin with the same turns, and what one of them holds out the
    others train on."""
    if not 0 < fraction < 1:
        raise UsageError(f"held_out is {fraction}; expected a part of the rows, above 0 and below 1")
    groups: dict[str, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        groups[first_question_hash(item.prompt)].append(number)
    wanted, chosen = max(1, round(fraction * len(items))), set[int]()
    for _, numbers in sorted(groups.items()):
        if len(chosen) < wanted:
            chosen.update(numbers)
    if len(chosen) == len(items):
        raise DataError(f"{len(items)} rows with {len(groups)} different questions are too few to hold some out")
    train = [item for number, item in enumerate(items) if number not in chosen]
    return train, [items[number] for number in sorted(chosen)]


def first_question_hash(prompt: Messages) -> str:
    """sha256 of a prompt's first message by the user (of all of them, where there is none), whatever its spaces and
    capitals."""
    question = [message for message in prompt if message["role"] == "user"][:1] or prompt
    text = "\n".join(re.sub(r"\s+", " ", message["content"]).strip().lower() for message in question)
    return hashlib.sha256(text.encode()).hexdigest()
