"""Rendering chat templates safely: a model folder's template is a program from an unknown author.

It runs in Jinja's immutable sandbox, in a process of its own with two seconds of processor time (and a little more
for each conversation) and 512 MB of memory. The sandbox prevents access to attributes; the process limits the rest
(an endless loop, a string doubled thirty times). `{% generation %} ... {% endgeneration %}` is transformers' tag
around what the model writes: here its place in the text is known exactly."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from llm_quest.errors import DataError

MAX_TEMPLATE_CHARACTERS, MAX_TEXT_CHARACTERS, MAX_TEMPLATE_NODES = 200_000, 1_000_000, 20_000
CPU_SECONDS, MEMORY_BYTES = 2, 512 * 2**20
CPU_SECONDS_PER_CONVERSATION = 0.01
WORKER_COMMAND = "from llm_quest.data.template_sandbox import run_worker; run_worker()"

Messages = list[dict[str, Any]]
"""Messages as transformers' `apply_chat_template` takes them."""


class RenderedChat(NamedTuple):
    """A conversation's text, and the spans that the template marks as written by the model."""

    text: str
    answer_spans: tuple[tuple[int, int], ...]


class RenderJob(NamedTuple):
    """A conversation to render. add_generation_prompt: whether the text ends where the assistant's next message
    begins. where: for errors."""

    messages: Messages
    add_generation_prompt: bool
    where: str = ""


def render_prompt(template: str, messages: Messages, *, special_tokens: dict[str, str] | None = None) -> str:
    """The prompt that asks for the assistant's next message. special_tokens: bos_token, eos_token and their like, by
    name."""
    return render_batch(template, [RenderJob(messages, add_generation_prompt=True)], special_tokens=special_tokens)[
        0
    ].text


def render_batch(
    template: str, jobs: Sequence[RenderJob], *, special_tokens: dict[str, str] | None = None
) -> list[RenderedChat]:
    """Render many conversations by one process. DataError names the one at which the template failed."""
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise DataError(
            f"the chat template has {len(template):,} characters; at most {MAX_TEMPLATE_CHARACTERS:,} are run"
        )
    seconds = CPU_SECONDS + int(CPU_SECONDS_PER_CONVERSATION * len(jobs))
    request = json.dumps({"template": template, "jobs": jobs, "special": special_tokens or {}, "seconds": seconds})
    try:
        done = subprocess.run(
            [sys.executable, "-c", WORKER_COMMAND],
            input=request, capture_output=True, text=True, timeout=seconds * 5, check=False,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise DataError(
            f"the chat template did not end within {seconds * 5} s; talk without it (quest chat --no-template)"
        ) from None
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it used more than its share of time or memory"])[-1]
        raise DataError(f"the chat template failed: {why[:200]}; talk without it (quest chat --no-template)")
    return [RenderedChat(text, tuple((a, b) for a, b in spans)) for text, spans in json.loads(done.stdout)]


def run_worker() -> None:
    """The worker process: jobs on stdin, texts with their spans as JSON on stdout."""
    request = json.load(sys.stdin)
    limit_resources(request["seconds"])
    done: list[Any] = []
    try:
        program = compile_template(request["template"])
        for messages, ask, _ in request["jobs"]:
            done.append(extract_spans(render_template(program, messages, ask, request["special"])))
        json.dump(done, sys.stdout)
    except Exception as error:
        where = request["jobs"][min(len(done), len(request["jobs"]) - 1)][2]
        sys.exit(f"{where + ': ' if where else ''}{type(error).__name__}: {error}")


def limit_resources(seconds: int) -> None:
    """Limit time and memory, where the system has resource limits; elsewhere the caller's timeout is the only one."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


SPAN_BEGIN, SPAN_END = "\U000ffffe", "\U000fffff"  # two noncharacters: they stand in no text


def compile_template(template: str) -> Any:
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
    if sum(1 for _ in environment.parse(template).find_all(nodes.Node)) > MAX_TEMPLATE_NODES:
        raise ValueError("too long a program")
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template)


def render_template(
    template: Any, messages: Messages, add_generation_prompt: bool, special_tokens: dict[str, str]
) -> str:
    """The rendered text, with marks."""
    if any(mark in message["content"] for message in messages for mark in (SPAN_BEGIN, SPAN_END)):
        raise ValueError("a message holds U+FFFFE or U+FFFFF, which are no characters")
    written, size = [], 0
    for piece in template.generate(messages=messages, add_generation_prompt=add_generation_prompt, **special_tokens):
        written.append(piece)
        size += len(piece)
        if size > MAX_TEXT_CHARACTERS:
            raise ValueError(f"it wrote more than {MAX_TEXT_CHARACTERS:,} characters")
    return "".join(written)


def extract_spans(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks, and the spans between them."""
    spans: list[tuple[int, int]] = []
    kept, begin = "", 0
    for mark, piece in split_at_marks(text):
        if mark == SPAN_BEGIN:
            begin = len(kept)
        elif mark == SPAN_END:
            spans.append((begin, len(kept)))
        kept += piece
    return kept, spans


def split_at_marks(text: str) -> Iterator[tuple[str, str]]:
    """(the mark before it, the text up to the next mark)."""
    mark, start = "", 0
    for at, character in enumerate(text):
        if character in (SPAN_BEGIN, SPAN_END):
            yield mark, text[start:at]
            mark, start = character, at + 1
    yield mark, text[start:]


def raise_exception(message: Any) -> NoReturn:
    """What templates call to refuse a conversation."""
    raise ValueError(str(message))


def strftime_now(form: str) -> str:
    """The current date and time, formatted."""
    return datetime.datetime.now().strftime(form)
