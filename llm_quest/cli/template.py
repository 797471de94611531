"""A model folder's chat template, which is a program written by a stranger: messages in, the prompt's text out.

It runs in Jinja's immutable sandbox, in a process of its own with two seconds of processor time and 512 MB of memory.
The sandbox stops the tricks with attributes; the process stops the rest (a loop without end, a string doubled thirty
times).
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from llm_quest.errors import DataError

MAX_TEMPLATE, MAX_TEXT, MAX_NODES = 200_000, 1_000_000, 20_000
SECONDS, BYTES = 2, 512 * 2**20
WORKER = "from llm_quest.cli.template import worker; worker()"

Messages = list[dict[str, str]]


def render(template: str, messages: Messages, *, special: dict[str, str] | None = None) -> str:
    """The prompt that asks for the assistant's next message. special: bos_token, eos_token and their like, by name."""
    if len(template) > MAX_TEMPLATE:
        raise DataError(f"the chat template has {len(template):,} characters; at most {MAX_TEMPLATE:,} are run")
    job = json.dumps({"template": template, "messages": messages, "special": special or {}})
    try:
        done = subprocess.run(
            [sys.executable, "-c", WORKER],
            input=job, capture_output=True, text=True, timeout=SECONDS * 5, check=False, cwd=Path(__file__).parents[2],
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise DataError(
            f"the chat template did not end within {SECONDS * 5} s; talk without it (--no-template)"
        ) from None
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it used more than its share of time or memory"])[-1]
        raise DataError(f"the chat template failed: {why[:200]}; talk without it (--no-template)")
    return str(json.loads(done.stdout))


def worker() -> None:
    """The other process: a job on stdin, the text as JSON on stdout."""
    limit_resources()
    job = json.load(sys.stdin)
    try:
        json.dump(expand(job["template"], job["messages"], job["special"]), sys.stdout)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")


def limit_resources() -> None:
    """Where the system has resource limits; elsewhere the caller's clock is the only one."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))


def expand(template: str, messages: Messages, special: dict[str, str]) -> str:
    """The template's text, in the sandbox; as transformers does it: blocks trimmed, `raise_exception`, `strftime_now`,
    `tojson`."""
    from jinja2 import nodes
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    if sum(1 for _ in environment.parse(template).find_all(nodes.Node)) > MAX_NODES:
        raise ValueError("too long a program")
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    written, size = [], 0
    for piece in environment.from_string(template).generate(messages=messages, add_generation_prompt=True, **special):
        written.append(piece)
        size += len(piece)
        if size > MAX_TEXT:
            raise ValueError(f"it wrote more than {MAX_TEXT:,} characters")
    return "".join(written)


def raise_exception(message: Any) -> NoReturn:
    """What templates call when they refuse a conversation."""
    raise ValueError(str(message))


def strftime_now(form: str) -> str:
    """Today, as templates ask for it."""
    return datetime.datetime.now().strftime(form)
