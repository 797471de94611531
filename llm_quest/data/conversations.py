"""Conversations: every kind of row that instruction data comes in, as one form: messages by roles, the last of them the
assistant's.

      {"messages": [{"role": "user", "content": ...}, ...]}        {"conversations": [{"from": "human", "value": ...}]}
      {"prompt": ..., "completion": ...}   (text or messages)      {"instruction": ..., "input": ..., "output": ...}
      {"question": ..., "answer": ...}

A row that is of no such form, or whose roles are out of order, stops with file and line. An empty answer is dropped and
counted: it would teach to say nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from llm_quest.data.documents import Ledger
from llm_quest.data.records import Record
from llm_quest.data.template import Messages
from llm_quest.errors import DataError, UsageError

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Other names of the roles system, user and assistant."""


@dataclass(frozen=True)
class Conversation:
    """messages: (role, content) each. where: file:line."""

    messages: tuple[tuple[str, str], ...]
    where: str = ""

    @property
    def plain(self) -> Messages:
        """As templates take them."""
        return [{"role": role, "content": content} for role, content in self.messages]

    @property
    def prompt(self) -> Messages:
        """All but the last answer."""
        return self.plain[:-1]

    @property
    def answer(self) -> str:
        """The last one."""
        return self.messages[-1][1]

    @property
    def hash(self) -> str:
        """sha256 of everything that was said."""
        return hashlib.sha256(repr(self.messages).encode()).hexdigest()


def conversations(records: Iterable[Record], ledger: Ledger) -> list[Conversation]:
    """What can be learned from; the ledger says what was dropped."""
    kept = []
    for record in records:
        found = conversation(record)
        size = sum(len(content.encode()) for _, content in found.messages)
        if not found.answer.strip():
            ledger.drop("empty answer", size)
        else:
            ledger.keep(size)
            kept.append(found)
    return kept


def conversation(record: Record) -> Conversation:
    """One row, by the first of the forms whose keys it has."""
    for keys, form in FORMS.items():
        if all(key in record.row for key in keys):
            said = form(record)
            require_order(said, record.where)
            return Conversation(tuple(said), record.where)
    known = "; ".join(", ".join(keys) for keys in FORMS)
    raise DataError(
        f"{record.where} has the keys {', '.join(map(str, record.row)) or '(none)'}; "
        f"expected those of one form: {known}"
    )


def require_order(said: Sequence[tuple[str, str]], where: str) -> None:
    """Perhaps a system message, then user and assistant in turn, the assistant last."""
    roles = [role for role, _ in said]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != [("user", "assistant")[i % 2] for i in range(len(turns))] or turns[-1] != "assistant":
        raise DataError(
            f"{where}: the roles are {', '.join(roles) or '(none)'}; expected an optional system message, then user "
            "and assistant in turn, with the assistant last"
        )


def messages(value: Any, where: str, role: str = "role", content: str = "content") -> list[tuple[str, str]]:
    """A list of messages as (role, content), roles by their common names."""
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise DataError(f"{where}: messages are a {type(value).__name__}, expected a list of objects")
    found = []
    for number, one in enumerate(value, start=1):
        if not isinstance(one.get(role), str) or not isinstance(one.get(content), str):
            raise DataError(
                f"{where}: message {number} needs {role!r} and {content!r}, both text; it has {dict(one)!r:.80}"
            )
        name = ROLES.get(one[role], one[role])
        if name not in ("system", "user", "assistant"):
            raise DataError(f"{where}: message {number} has the role {one[role]!r}; known: system, user, assistant")
        found.append((name, one[content]))
    return found


def text(record: Record, key: str) -> str:
    """A value that has to be text."""
    value = record.row.get(key, "")
    if not isinstance(value, str):
        raise DataError(f"{record.where}: {key!r} is a {type(value).__name__}, expected text")
    return value


def said(record: Record, key: str, role: str) -> list[tuple[str, str]]:
    """Text as one message of a role, or a list of messages."""
    value = record.row[key]
    return messages(value, record.where) if isinstance(value, list) else [(role, text(record, key))]


def asked(record: Record) -> list[tuple[str, str]]:
    """An Alpaca row's instruction, with its input below it."""
    task, given = text(record, "instruction").strip(), text(record, "input").strip()
    return [("user", f"{task}\n\n{given}" if given else task)]


Form = Callable[[Record], list[tuple[str, str]]]
FORMS: dict[tuple[str, ...], Form] = {
    ("messages",): lambda record: messages(record.row["messages"], record.where),
    ("conversations",): lambda record: messages(record.row["conversations"], record.where, "from", "value"),
    ("prompt", "completion"): lambda record: said(record, "prompt", "user") + said(record, "completion", "assistant"),
    ("instruction", "output"): lambda record: [*asked(record), ("assistant", text(record, "output"))],
    ("question", "answer"): lambda record: [
        ("user", text(record, "question")), ("assistant", text(record, "answer"))
    ],
}  # fmt: skip


class Asked(Protocol):
    """Anything with a question."""

    @property
    def prompt(self) -> Messages: ...


Item = TypeVar("Item", bound=Asked)


def held_apart(items: Sequence[Item], part: float) -> tuple[list[Item], list[Item]]:
    """(to train on, held out): about `part` of the items, chosen by the hash of their question, so that the same
    question with other answers is never on both sides, no seed is needed, and a new row moves few others."""
    if not 0 < part < 1:
        raise UsageError(f"held_out is {part}; expected a part of the rows, above 0 and below 1")
    groups: dict[str, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        groups[question_hash(item.prompt)].append(number)
    wanted, chosen = max(1, round(part * len(items))), set[int]()
    for _, numbers in sorted(groups.items()):
        if len(chosen) < wanted:
            chosen.update(numbers)
    if len(chosen) == len(items):
        raise DataError(f"{len(items)} rows with {len(groups)} different questions are too few to hold some out")
    train = [item for number, item in enumerate(items) if number not in chosen]
    return train, [items[number] for number in sorted(chosen)]


def question_hash(prompt: Messages) -> str:
    """sha256 of a question, whatever its spaces and capitals."""
    told = "\n".join(re.sub(r"\s+", " ", message["content"]).strip().lower() for message in prompt)
    return hashlib.sha256(told.encode()).hexdigest()
