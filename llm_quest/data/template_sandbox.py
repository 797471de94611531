"""Rendering chat templates safely: a model folder's template is a program from an unknown author.

It runs in Jinja's immutable sandbox, in a process of its own with limited processor time and 512 MB of memory. The
sandbox prevents access to attributes; the process limits the rest (an endless loop, a string doubled thirty times).
Conversations go there in batches, so that neither side holds the text of a whole data set twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from llm_quest.child_process import end_with_parent
from llm_quest.data.answer_layout import AnswerLayout, LaidOut, roles_left_out
from llm_quest.data.template_messages import with_text_arguments
from llm_quest.data.template_program import RenderJob, TemplateProgram, TemplateSettings, extract_spans
from llm_quest.errors import DataError

MAX_TEMPLATE_CHARACTERS = 200_000
CPU_SECONDS, MEMORY_BYTES = 2, 512 * 2**20
CPU_SECONDS_PER_RENDERING = 0.01
WAIT_SECONDS = 60
"""By the clock, which on a busy machine goes on while the process gets no processor."""
BATCH_CHARACTERS, BATCH_RENDERINGS = 4_000_000, 4_000
WORKER_COMMAND = "from llm_quest.data.template_sandbox import run_worker; run_worker()"
ADVICE = "talk without it (quest chat --no-template)"

Messages = list[dict[str, Any]]
"""Messages as transformers' `apply_chat_template` takes them."""


class RenderedChat(NamedTuple):
    """A conversation's text, and the spans of what the model writes."""

    text: str
    answer_spans: tuple[tuple[int, int], ...]


class Rendering(NamedTuple):
    """What a template made of one conversation: its rows, or why it refused it. unwritten: roles of messages that it
    left out."""

    rows: tuple[RenderedChat, ...]
    error: str = ""
    unwritten: tuple[str, ...] = ()


def render_prompt(
    template: str,
    messages: Messages,
    *,
    special_tokens: Mapping[str, str] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt that asks for the assistant's next message. special_tokens: bos_token, eos_token and their like, by
    name. chat_template_kwargs: what the template reads besides messages."""
    settings = TemplateSettings(template, special_tokens or {}, chat_template_kwargs=dict(chat_template_kwargs or {}))
    return render_batch(settings, [RenderJob(messages, add_generation_prompt=True)])[0].text


def render_batch(settings: TemplateSettings, jobs: Sequence[RenderJob]) -> list[RenderedChat]:
    """Render conversations, each as one text. DataError names the first at which the template failed."""
    rendered = []
    for job, one in zip(jobs, render_jobs(settings, jobs), strict=True):
        if one.error:
            raise DataError(f"the chat template failed: {job.where + ': ' if job.where else ''}{one.error}; {ADVICE}")
        rendered.append(one.rows[0])
    return rendered


def render_jobs(settings: TemplateSettings, jobs: Iterable[RenderJob]) -> Iterator[Rendering]:
    """Render conversations in batches, a process for each batch, which runs while what was rendered before is read.
    DataError where the template cannot run at all."""
    if len(settings.source) > MAX_TEMPLATE_CHARACTERS:
        raise DataError(
            f"the chat template has {len(settings.source):,} characters; at most {MAX_TEMPLATE_CHARACTERS:,} are run"
        )
    with ThreadPoolExecutor(1) as executor:
        running: Future[list[Rendering]] | None = None
        for batch in split_batches(jobs):
            done, running = running, executor.submit(run_batch, settings, batch)
            yield from done.result() if done else ()
        yield from running.result() if running else ()


def split_batches(jobs: Iterable[RenderJob]) -> Iterator[list[RenderJob]]:
    """Batches of bounded size and work; a longer conversation is a batch of its own."""
    batch: list[RenderJob] = []
    characters = renderings = 0
    for job in jobs:
        size, work = len(repr(job.messages)), max_renderings(job)
        if batch and (characters + size > BATCH_CHARACTERS or renderings + work > BATCH_RENDERINGS):
            yield batch
            batch, characters, renderings = [], 0, 0
        batch.append(job)
        characters, renderings = characters + size, renderings + work
    if batch:
        yield batch


def max_renderings(job: RenderJob) -> int:
    """How often a conversation is rendered at most."""
    return 1 + 2 * len(job.learned or ())


def run_batch(settings: TemplateSettings, jobs: Sequence[RenderJob]) -> list[Rendering]:
    """Render a batch by one process."""
    seconds = CPU_SECONDS + int(CPU_SECONDS_PER_RENDERING * sum(map(max_renderings, jobs)))
    limit = max(WAIT_SECONDS, 5 * seconds)
    head = {"settings": vars(settings), "seconds": seconds, "parent": os.getpid()}
    request = "".join(f"{json.dumps(one)}\n" for one in (head, *jobs))
    try:
        done = subprocess.run(
            [sys.executable, "-c", WORKER_COMMAND],
            input=request, capture_output=True, text=True, timeout=limit, check=False,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"the chat template did not end within {limit} s{describe_conversation(jobs, error.stdout)}; {ADVICE}"
        ) from None
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it used more than its share of time or memory"])[-1]
        raise DataError(f"the chat template failed{describe_conversation(jobs, done.stdout)}: {why[:200]}; {ADVICE}")
    return [parse_rendering(line) for line in done.stdout.split("\n")[:-1]]


def describe_conversation(jobs: Sequence[RenderJob], output: str | bytes | None) -> str:
    """The conversation that was being rendered when the process ended."""
    lines = (output or "").count("\n") if isinstance(output, str | None) else output.count(b"\n")
    where = jobs[min(lines, len(jobs) - 1)].where
    return f" at {where}" if where else ""


def parse_rendering(line: str) -> Rendering:
    rows, error, unwritten = json.loads(line)
    texts = (RenderedChat(text, tuple((a, b) for a, b in spans)) for text, spans in rows)
    return Rendering(tuple(texts), error, tuple(unwritten))


def run_worker() -> None:
    """The worker process: settings and jobs on stdin, a line of JSON each on stdout."""
    head = json.loads(sys.stdin.readline())
    end_with_parent(head["parent"])
    limit_resources(head["seconds"])
    try:
        program = TemplateProgram(TemplateSettings(**head["settings"]))
        layout = AnswerLayout(program)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
    for line in sys.stdin:
        job = RenderJob(*json.loads(line))
        rows, reason = render_job(layout, job)
        left_out = roles_left_out(job.messages, rows[-1].text) if rows else []
        sys.stdout.write(json.dumps((rows, reason, left_out)) + "\n")
        sys.stdout.flush()


def render_job(layout: AnswerLayout, job: RenderJob) -> tuple[list[LaidOut], str]:
    """The rows of a conversation and "", or none and why the template refuses it. Arguments of functions are objects,
    as transformers documents them; where a template fails on these (DeepSeek-V3 adds them to a text) they are text."""
    reason = ""
    for form in (job, job._replace(messages=with_text_arguments(job.messages))):
        if reason and form == job:
            break
        try:
            if job.learned is not None:
                return layout.lay_out(form), ""
            text = layout.program.render(form.messages, form.tools, form.add_generation_prompt)
            return [LaidOut(*extract_spans(text))], ""
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {error}"
    return [], reason


def limit_resources(seconds: int) -> None:
    """Limit time and memory by whatever this system takes; the caller's timeout holds everywhere."""
    try:
        import resource

        kinds = ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, MEMORY_BYTES))
    except (ImportError, AttributeError):  # Windows
        watch_memory()
        return
    for kind, limit in kinds:
        try:
            resource.setrlimit(kind, (limit, limit))
        except (OSError, ValueError):  # macOS refuses to limit the address space
            watch_memory()


def watch_memory() -> None:
    """End this process when it holds more memory than it may, where the system does not see to it."""
    import psutil

    process = psutil.Process()

    def watch() -> None:
        while process.memory_info().rss < MEMORY_BYTES:
            time.sleep(0.02)
        os.write(2, b"MemoryError: more than its share of memory\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
