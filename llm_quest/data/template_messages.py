"""Messages as a chat template takes them: nothing in them spells a control token, and the fields of reasoning and
function calls have the form that the template reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REASONING_TAGS = ("<think>", "</think>")
"""What an assistant may write as control tokens, where a tokenizer has them as such."""
TESTS_FOR_NONE = re.compile(r"""content['"]?\]?\s+is\s+(not\s+)?none""")

Message = Mapping[str, Any]
Escape = Callable[[str], str]


@dataclass(frozen=True)
class MessageWriter:
    """Prepares messages for the template with this source. escape: of a text, so that nothing in it spells a control
    token."""

    source: str
    escape: Escape

    def write(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages for the template."""
        return [self.write_message(message) for message in messages]

    def write_message(self, message: Message) -> dict[str, Any]:
        done = {key: value if key == "role" else self.escape_value(value) for key, value in message.items()}
        if done["role"] == "assistant":
            done |= {key: self.keep_reasoning_tags(text) for key, text in done.items() if isinstance(text, str)}
        if done.get("tool_calls"):
            done["tool_calls"] = [with_arguments(call, parse_arguments) for call in done["tool_calls"]]
            if done.get("content") == "" and TESTS_FOR_NONE.search(self.source):
                done["content"] = None
        if "reasoning_content" in done and "reasoning_content" not in self.source and "thinking" in self.source:
            done["thinking"] = done.pop("reasoning_content")
        return done

    def escape_value(self, value: Any) -> Any:
        """A JSON value with every text in it escaped."""
        if isinstance(value, str):
            return self.escape(value)
        if isinstance(value, Mapping):
            return {key: self.escape_value(one) for key, one in value.items()}
        return [self.escape_value(one) for one in value] if isinstance(value, list | tuple) else value

    def keep_reasoning_tags(self, text: str) -> str:
        for tag in REASONING_TAGS:
            text = text.replace(self.escape(tag), tag)
        return text

    def drops_reasoning(self, messages: Iterable[Message]) -> bool:
        """Whether there is reasoning in a field of its own that the template knows nothing of."""
        if any(word in self.source for word in ("reasoning_content", "thinking", REASONING_TAGS[1])):
            return False
        return any(message.get("reasoning_content") for message in messages)

    def unknown_keys(self, messages: Iterable[Message], *, has_tools: bool) -> list[str]:
        """What messages and their conversation have that the template knows nothing of."""
        keys = {key for message in messages for key in UNWRITTEN_KEYS if message.get(key)}
        return [key for key in sorted(keys | ({"tools"} if has_tools else set())) if key not in self.source]


UNWRITTEN_KEYS = ("tool_call_id", "name")
"""Keys of messages that a template may not know; function calls that it does not know are refused."""


def with_arguments(call: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A function call with its arguments changed; OpenAI's form has them below `function`."""
    if isinstance(function := call.get("function"), Mapping):
        return {**call, "function": with_arguments(function, change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else dict(call)


def parse_arguments(arguments: Any) -> Any:
    """Arguments that are JSON text as an object; others as they are."""
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def dump_arguments(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of every function call as JSON text."""
    return [
        {**message, "tool_calls": [with_arguments(call, dump_arguments) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]
