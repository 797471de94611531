"""A chat template as a program: compiled in Jinja's immutable sandbox, rendered as transformers renders it.

`{% generation %} ... {% endgeneration %}` is transformers' tag around what the model writes: here its place in the text
is known exactly. All of this runs in the template's own process (`data/template_sandbox.py`)."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

MAX_TEXT_CHARACTERS, MAX_TEMPLATE_NODES = 1_000_000, 20_000
SPAN_BEGIN, SPAN_END = "\U000ffffe", "\U000fffff"  # two noncharacters: they stand in no text

RESERVED_ARGUMENTS = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")
PROBE = "\ufdd2probe"  # begins with a noncharacter: no template writes it

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class TemplateSettings:
    """What all conversations of one template share. special_tokens: bos_token, eos_token and their like, by name.
    chat_template_kwargs: what the template reads besides, such as enable_thinking. control_tokens: all of the
    tokenizer's. now: the date and time that the template is told, in ISO form; empty: the clock's."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    control_tokens: tuple[str, ...] = ()
    now: str = ""


class RenderJob(NamedTuple):
    """A conversation to render. add_generation_prompt: whether the text ends where the assistant's next message
    begins. tools: functions, as JSON schemas. learned: the places of the messages that are learned, whose spans are
    wanted; None: the text alone. where: for errors."""

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool
    where: str = ""
    tools: Sequence[Mapping[str, Any]] = ()
    learned: tuple[int, ...] | None = None


class TemplateProgram:
    """A compiled template. renderings: how often it has run. takes_parts: whether it writes content that is a list of
    parts alone (Idefics3, LLaVA)."""

    def __init__(self, settings: TemplateSettings):
        self.settings, self.renderings, self.takes_parts = settings, 0, False
        self.compiled = compile_template(settings)
        self.has_generation_tags = "generation" in template_statements(settings.source)
        self.takes_parts = not self.writes_content(PROBE) and self.writes_content([{"type": "text", "text": PROBE}])

    def writes_content(self, content: Any) -> bool:
        """Whether the text of a user's message with this content is written."""
        try:
            return PROBE in self.render([{"role": "user", "content": content}], (), True)
        except Exception:  # the template refuses it
            return False

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], add_generation_prompt: bool) -> str:
        """The text, with marks where the template has generation tags. ValueError where it is much longer than what
        was said."""
        self.renderings += 1
        if self.takes_parts:
            messages = [as_parts(message) for message in messages]
        limit = MAX_TEXT_CHARACTERS + 2 * sum(map(text_size, (*messages, *tools)))
        written, size = [], 0
        for piece in self.compiled.generate(
            **self.settings.special_tokens,
            **self.settings.chat_template_kwargs,
            messages=messages,
            tools=tools or None,
            add_generation_prompt=add_generation_prompt,
        ):
            written.append(piece)
            size += len(piece)
            if size > limit:
                raise ValueError(f"it wrote more than {MAX_TEXT_CHARACTERS:,} characters beside what was said")
        return "".join(written)


def find_reserved_argument(given: Mapping[str, Any]) -> str | None:
    """The first argument whose name every template gets from us."""
    return next((name for name in given if name in RESERVED_ARGUMENTS), None)


def find_unread_arguments(source: str, given: Mapping[str, Any]) -> list[str]:
    """The arguments that a template does not name."""
    return [name for name in given if not re.search(rf"\b{re.escape(name)}\b", source)]


def template_statements(source: str) -> set[str]:
    """The template's statements by their first word."""
    return set(re.findall(r"\{%[-+]?\s*(\w+)", source))


def as_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose text is a list of one part."""
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def text_size(value: Any) -> int:
    """Characters of all texts in a JSON value. ValueError for the two marks."""
    if isinstance(value, str):
        if SPAN_BEGIN in value or SPAN_END in value:
            raise ValueError("a message holds U+FFFFE or U+FFFFF, which are no characters")
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(text_size, value.values()))
    return sum(map(text_size, value)) if isinstance(value, list | tuple) else 0


def compile_template(settings: TemplateSettings) -> Any:
    """Compile a template in the sandbox, as transformers does it: blocks trimmed, `raise_exception`, `strftime_now`,
    `tojson`, the `generation` tag."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The `generation` tag: marks what is between the tags."""

        tags = {"generation"}  # noqa: RUF012 (what Jinja's class declares)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_between"), [], [], body).set_lineno(line)

        def _between(self, caller: Any) -> str:
            return SPAN_BEGIN + caller() + SPAN_END

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    if sum(1 for _ in environment.parse(settings.source).find_all(nodes.Node)) > MAX_TEMPLATE_NODES:
        raise ValueError("too long a program")
    now = datetime.datetime.fromisoformat(settings.now) if settings.now else datetime.datetime.now()
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": now.strftime}
    environment.filters["tojson"] = tojson
    return environment.from_string(settings.source)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' `tojson`: characters as they are, nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: Any) -> NoReturn:
    """What templates call to refuse a conversation."""
    raise ValueError(str(message))


def extract_spans(text: str) -> tuple[str, Spans]:
    """The text without the marks, and the spans between them."""
    spans: Spans = []
    kept, size, begin = [], 0, 0
    for number, part in enumerate(text.split(SPAN_BEGIN)):
        inside, _, after = part.partition(SPAN_END) if number else ("", "", part)
        begin = size
        if number:
            spans.append((begin, begin + len(inside)))
        kept += [inside, after]
        size += len(inside) + len(after)
    return "".join(kept), spans
