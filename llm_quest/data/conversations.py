"""Conversations: the row formats of instruction data, read as messages with roles, the last of them the assistant's.

      {"messages": [{"role": "user", "content": ...}, ...]}        {"conversations": [{"from": "human", "value": ...}]}
      {"prompt": ..., "completion": ...}   (text or messages)      {"instruction": ..., "input": ..., "output": ...}
      {"question": ..., "answer": ...}

A row that is of no such form, or whose roles are out of order, stops with file and line. An empty answer is dropped and
counted: it would train the model to say nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from llm_quest.data.documents import DropReport
from llm_quest.data.messages import Message, to_messages
from llm_quest.data.records import Record
from llm_quest.data.template_sandbox import Messages
from llm_quest.errors import DataError, UsageError

ROLE_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Other names of the roles system, user and assistant."""


@dataclass(frozen=True)
class Conversation:
    """messages: also given as pairs of role and content. tools: the functions that the assistant may call, as JSON
    schemas for the chat template. weight: how often it is seen in an epoch. where: file:line."""

    messages: tuple[Message, ...]
    where: str = ""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", to_messages(self.messages))

    @property
    def message_dicts(self) -> Messages:
        """Messages as chat templates take them."""
        return [one.as_dict() for one in self.messages]

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
    for record in records:
        found = parse_conversation(record)
        size = sum(len(one.content.encode()) for one in found.messages)
        if not found.answer.strip():
            drop_report.drop("empty answer", size)
        else:
            drop_report.keep(size)
            kept.append(found)
    return kept


def parse_conversation(record: Record) -> Conversation:
    """Parse one row, by the first of the forms whose keys it has."""
    for keys, form in ROW_PARSERS.items():
        if all(key in record.row for key in keys):
            said = form(record)
            check_role_order(said, record.where)
            return Conversation(tuple(said), record.where)
    known = "; ".join(", ".join(keys) for keys in ROW_PARSERS)
    raise DataError(
        f"{record.where} has the keys {', '.join(map(str, record.row)) or '(none)'}; "
        f"expected those of one form: {known}"
    )


def check_role_order(messages: Sequence[tuple[str, str]], where: str) -> None:
    """Check the roles: perhaps a system message, then user and assistant in turn, the assistant last."""
    roles = [role for role, _ in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != [("user", "assistant")[i % 2] for i in range(len(turns))] or turns[-1] != "assistant":
        raise DataError(
            f"{where}: the roles are {', '.join(roles) or '(none)'}; expected an optional system message, then user "
            "and assistant in turn, with the assistant last"
        )


def parse_messages(value: Any, where: str, role: str = "role", content: str = "content") -> list[tuple[str, str]]:
    """A list of messages as (role, content), roles by their common names."""
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise DataError(f"{where}: messages are a {type(value).__name__}, expected a list of objects")
    found = []
    for number, one in enumerate(value, start=1):
        if not isinstance(one.get(role), str) or not isinstance(one.get(content), str):
            raise DataError(
                f"{where}: message {number} needs {role!r} and {content!r}, both text; it has {dict(one)!r:.80}"
            )
        name = ROLE_ALIASES.get(one[role], one[role])
        if name not in ("system", "user", "assistant"):
            raise DataError(f"{where}: message {number} has the role {one[role]!r}; known: system, user, assistant")
        found.append((name, one[content]))
    return found


def text_field(record: Record, key: str) -> str:
    """A value that has to be text."""
    value = record.row.get(key, "")
    if not isinstance(value, str):
        raise DataError(f"{record.where}: {key!r} is a {type(value).__name__}, expected text")
    return value


def message_field(record: Record, key: str, role: str) -> list[tuple[str, str]]:
    """Text as one message of a role, or a list of messages."""
    value = record.row[key]
    return parse_messages(value, record.where) if isinstance(value, list) else [(role, text_field(record, key))]


def alpaca_prompt(record: Record) -> list[tuple[str, str]]:
    """An Alpaca row's instruction, with its input below it."""
    task, given = text_field(record, "instruction").strip(), text_field(record, "input").strip()
    return [("user", f"{task}\n\n{given}" if given else task)]


RowParser = Callable[[Record], list[tuple[str, str]]]
ROW_PARSERS: dict[tuple[str, ...], RowParser] = {
    ("messages",): lambda record: parse_messages(record.row["messages"], record.where),
    ("conversations",): lambda record: parse_messages(record.row["conversations"], record.where, "from", "value"),
    ("prompt", "completion"): lambda record: [
        *message_field(record, "prompt", "user"), *message_field(record, "completion", "assistant")
    ],
    ("instruction", "output"): lambda record: [*alpaca_prompt(record), ("assistant", text_field(record, "output"))],
    ("question", "answer"): lambda record: [
        ("user", text_field(record, "question")), ("assistant", text_field(record, "answer"))
    ],
}  # fmt: skip


class HasPrompt(Protocol):
    """Anything with a prompt."""

    @property
    def prompt(self) -> Messages: ...


Item = TypeVar("Item", bound=HasPrompt)


def split_by_prompt(items: Sequence[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """(training, held out): about `held_out` of the items, chosen by the hash of their prompt, so that the same
    question with other answers is never on both sides, no seed is needed, and a new row moves few others."""
    if not 0 < fraction < 1:
        raise UsageError(f"held_out is {fraction}; expected a part of the rows, above 0 and below 1")
    groups: dict[str, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        groups[prompt_hash(item.prompt)].append(number)
    wanted, chosen = max(1, round(fraction * len(items))), set[int]()
    for _, numbers in sorted(groups.items()):
        if len(chosen) < wanted:
            chosen.update(numbers)
    if len(chosen) == len(items):
        raise DataError(f"{len(items)} rows with {len(groups)} different questions are too few to hold some out")
    train = [item for number, item in enumerate(items) if number not in chosen]
    return train, [items[number] for number in sorted(chosen)]


def prompt_hash(prompt: Messages) -> str:
    """sha256 of a prompt, whatever its spaces and capitals."""
    text = "\n".join(re.sub(r"\s+", " ", message["content"]).strip().lower() for message in prompt)
    return hashlib.sha256(text.encode()).hexdigest()
