"""Message: one turn of a conversation, as chat templates take it, and whether it is learned.

Parsing rows into messages (`data/row_forms.py`) and rendering messages as text (`data/chat.py`) meet here alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

EXTRA_MESSAGE_KEYS = ("reasoning_content", "tool_calls", "tool_call_id", "name")
"""Keys of a message besides role and content that published chat templates read."""


@dataclass(frozen=True)
class Message:
    """A message of a conversation. role: system, user, assistant or tool. train: whether an assistant's message is
    learned; others never are. extra: the keys of EXTRA_MESSAGE_KEYS that it has, for the chat template."""

    role: str
    content: str
    train: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def as_dict(self) -> dict[str, Any]:
        """The message for a chat template."""
        return {"role": self.role, "content": self.content, **self.extra}

    @property
    def is_learned(self) -> bool:
        return self.role == "assistant" and self.train


def to_messages(turns: Iterable[Message | tuple[str, str]]) -> tuple[Message, ...]:
    """Messages from messages, or from pairs of role and content."""
    return tuple(turn if isinstance(turn, Message) else Message(*turn) for turn in turns)
