"""Messages in rows: every spelling of a turn becomes a `Message`.

{"role": "user", "content": ...}            OpenAI; content is text or a list of {"type": "text", "text": ...}, of
                                            the Responses API input_text and output_text
{"from": "human", "value": ...}             ShareGPT
{"role": "assistant", "content": ..., "weight": 0}     not learned; also "train": false
{"role": "assistant", "tool_calls": [...]}, {"role": "tool", ...}; ShareGPT's function_call and observation; OpenAI's
earlier {"role": "assistant", "function_call": {...}}, {"role": "function", ...} and `functions`
"\\n\\nHuman: ...\\n\\nAssistant: ..."          a transcript, as in hh-rlhf"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm_quest.data.messages import EXTRA_MESSAGE_KEYS, Message
from llm_quest.data.records import TrackedRow
from llm_quest.errors import RowError

ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {
    "human": "user", "gpt": "assistant", "ai": "assistant", "bot": "assistant", "model": "assistant",
    "chatgpt": "assistant",
    "developer": "system", "function_call": "assistant", "observation": "tool", "function": "tool",
    "function_response": "tool", "ipython": "tool",
}  # fmt: skip
"""Other names of the roles, which are read in capitals too."""
ROLE_KEYS = (("role", "content"), ("from", "value"))
TRAIN_KEYS = ("weight", "train")
"""Keys of a message that say whether it is learned: 0 or false, 1 or true."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that are text: OpenAI's, and those of its Responses API."""
SPELLED_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:""")
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):[ ]?")


def parse_messages(
    row: Mapping[str, Any], key: str, where: str, *, value: Any = None, extra: bool = True
) -> list[Message]:
    """The messages under a key of a row. value: the part of it to read, for all of it None. extra: whether to keep
    reasoning and tool calls; without, they count as keys that nothing reads."""
    value = row[key] if value is None else value
    value = parse_json_cell(value, where) if isinstance(value, str) else value
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list | tuple) or not all(isinstance(one, Mapping) for one in value):
        what = type(value).__name__
        if what in ("list", "tuple"):
            what += f" that holds a {next(type(one).__name__ for one in value if not isinstance(one, Mapping))}"
        raise RowError(where, "no list of messages", f"{key} is a {what}, expected a list of messages")
    parts = TrackedRow.wrap(row).track_parts(key, list(value))
    return [parse_message(part, f"{where}: message {n}", extra) for n, part in enumerate(parts, start=1)]


def parse_json_cell(text: str, where: str) -> Any:
    """A list that a table holds as JSON text; any other text as it is."""
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(where, "not JSON", f"a cell begins like JSON and is none ({error})") from None


def read_cell(row: Mapping[str, Any], key: str, where: str) -> Any:
    """A value that is a list or a number, also as the JSON text of a table."""
    value = row[key]
    return parse_json_cell(value, where) if isinstance(value, str) else value


def read_spelled_messages(value: Any, where: str) -> Any:
    """The messages that a text spells; any other value as it is. RowError for messages as Python prints them, which
    would be learned as text."""
    if not isinstance(value, str) or not SPELLED_MESSAGES.match(value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        reason = f"a cell spells messages and is no JSON: {value[:40]!r}; write it with json.dumps"
        raise RowError(where, "messages that are no JSON", reason) from None


def parse_message(row: TrackedRow, where: str, extra: bool = True) -> Message:
    role_key, content_key = next((keys for keys in ROLE_KEYS if keys[0] in row), ROLE_KEYS[0])
    written = row.get(role_key)
    name = written.strip().lower() if isinstance(written, str) else None
    role = ROLE_ALIASES.get(name, name) if name else None
    if "type" in row and row["type"] != "message":
        reason = f"is an item of type {row['type']!r:.40}; expected messages with a role (calls: tool_calls)"
        raise RowError(where, f"an item of type {row['type']!r:.30}", reason)
    if role not in ROLES:
        known = ", ".join((*ROLES, *ROLE_ALIASES))
        raise RowError(where, f"the role {written!r:.30}", f"has the role {written!r:.60}; known: {known}")
    fields = parse_extra_keys(row, where) if extra else {}
    if name == "function_call":
        fields["tool_calls"] = [as_tool_call(call) for call in parse_calls(row.get(content_key), where)]
        return Message(role, "", parse_train(row, where), fields)
    if content_key not in row and "tool_calls" not in fields:
        raise RowError(where, f"a message without {content_key}", f"has no {content_key!r}, or null")
    return Message(role, parse_content(row.get(content_key, ""), where), parse_train(row, where), fields)


def parse_extra_keys(row: TrackedRow, where: str) -> dict[str, Any]:
    """Reasoning, name and function calls of a message, where it has them. RowError for values that no chat template
    could write."""
    fields = {key: row[key] for key in EXTRA_MESSAGE_KEYS if key in row and row[key] not in ("", [])}
    for key, value in fields.items():
        if key == "tool_calls":
            fields[key] = parse_calls(value, where)
        elif not isinstance(value, str | int) or (key == "reasoning_content" and not isinstance(value, str)):
            raise RowError(where, f"{key} that is no text", f"{key} is a {type(value).__name__}, expected text")
    if row.get("function_call"):
        calls = [as_tool_call(call) for call in parse_calls(row["function_call"], where)]
        if "tool_calls" in fields:
            raise RowError(where, "two kinds of calls", "has function_call and tool_calls; expected one of them")
        fields["tool_calls"] = calls
    return fields


def parse_calls(value: Any, where: str) -> list[Mapping[str, Any]]:
    """Function calls in OpenAI's form, or their function alone; one or a list, also as JSON text."""
    calls = parse_json_cell(value, where) if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, Mapping) else list(as_list(calls))
    functions = [call.get("function", call) if isinstance(call, Mapping) else None for call in calls]
    if (
        not all(isinstance(function, Mapping) and isinstance(function.get("name"), str) for function in functions)
        or not functions
    ):
        reason = f"its call is {value!r:.60}; expected a function with name and arguments, or a list of them"
        raise RowError(where, "a function call of another form", reason)
    return calls


def as_tool_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function alone (name and arguments), or its schema (name and parameters), in the form that `tool_calls` and
    `tools` have."""
    return call if "function" in call else {"type": "function", "function": dict(call)}


def as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def parse_content(value: Any, where: str) -> str:
    """Text, or the text of parts that are text. RowError for images and other parts, which text recipes cannot read."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(where, "content that is no text", f"its content is a {type(value).__name__}, expected text")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise RowError(where, f"a content part {kind!r}", f"a part of its content is {part!r:.60}, expected text")
        texts.append(text)
    return "".join(texts)


def parse_train(row: TrackedRow, where: str) -> bool:
    """Whether a message is learned: its `weight` and `train` are both true or not given."""
    for key in TRAIN_KEYS:
        if key in row and row[key] not in (0, 1):
            raise RowError(where, f"{key} of a message", f"{key} is {row[key]!r:.40}; expected 0, 1, true or false")
    return all(bool(row.get(key, True)) for key in TRAIN_KEYS)


def parse_tools(row: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    """The functions under `tools`, or under `functions` as OpenAI had them before; also as JSON text."""
    key = "functions" if row.get("functions") and not row.get("tools") else "tools"
    value = row.get(key, ())
    value = parse_json_cell(value, where) if isinstance(value, str) and value else value or ()
    if not isinstance(value, Sequence) or not all(isinstance(one, Mapping) for one in value):
        raise RowError(where, f"{key} that are no list", f"{key} is {value!r:.60}; expected a list of objects")
    return tuple(map(as_tool_call, value) if key == "functions" else value)


def parse_transcript(text: str, where: str) -> list[Message]:
    """hh-rlhf's text, in which `\\n\\nHuman: ` and `\\n\\nAssistant: ` begin the turns."""
    before, *turns = TRANSCRIPT.split("\n\n" + text.lstrip())
    if before.strip() or not turns:
        raise RowError(where, "no transcript", f"the text begins with {text[:40]!r}; expected 'Human: ...'")
    return [
        Message("user" if name == "Human" else "assistant", content.strip())
        for name, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def text_field(row: Mapping[str, Any], key: str, where: str) -> str:
    """A value that has to be text; empty where the row has none."""
    value = row.get(key, "")
    if not isinstance(value, str):
        raise RowError(where, f"{key} that is no text", f"{key!r} is a {type(value).__name__}, expected text")
    return value


def text_or_messages(row: Mapping[str, Any], key: str, role: str, where: str, *, extra: bool = True) -> list[Message]:
    """Text as one message of a role, or a list of messages, which a table holds as JSON text."""
    value = read_spelled_messages(row[key], where)
    if isinstance(value, list | Mapping):
        return parse_messages(row, key, where, value=value, extra=extra)
    return [Message(role, text_field(row, key, where))]
