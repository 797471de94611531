"""The chat templates that TRL ships: what is learned of an answer is what TRL's training form of the template marks.

The oracle is transformers' renderer with TRL's `*_training.jinja`, in which somebody put {% generation %} by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from llm_quest.data.answer_layout import AnswerLayout
from llm_quest.data.template_messages import MessageWriter
from llm_quest.data.template_program import RenderJob, TemplateProgram, TemplateSettings
from llm_quest.data.template_sandbox import render_job
from tests.later import Later

chat_template_utils = Later("transformers.utils.chat_template_utils")

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
CONTROL = re.compile(
    r"<\|[A-Za-z_0-9/]+\|?>|<[A-Za-z]+\|>|<｜[^｜>]+｜>|<start_of_turn>|<end_of_turn>|<end_of_utterance>|</s>"
)
TOOL = {"type": "function", "function": {"name": "find", "description": "finds", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}  # fmt: skip # noqa: E501
CALL = [{"type": "function", "function": {"name": "find", "arguments": {"x": 1}}}]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **fields) -> dict:
    return {"role": "assistant", "content": text, **fields}


ROWS = {
    "one answer": [user("Q1"), assistant("A1")],
    "reasoning": [user("Q1"), assistant("<think>\nhm\n</think>\n\nA1")],
    "reasoning in its field": [user("Q1"), assistant("A1", reasoning_content="hm")],
    "two answers": [user("Q1"), assistant("A1"), user("Q2"), assistant("A2")],
    "two with reasoning": [
        user("Q1"), assistant("<think>\nh1\n</think>\n\nA1"), user("Q2"), assistant("<think>\nh2\n</think>\n\nA2"),
    ],
    "a system message": [{"role": "system", "content": "S"}, user("Q1"), assistant("A1"), user("Q2"), assistant("A2")],
    "a function call": [
        user("Q1"), assistant("", tool_calls=CALL), {"role": "tool", "name": "find", "content": "42"}, assistant("A1"),
    ],
}  # fmt: skip


@cache
def templates() -> dict[str, str]:
    """The sources by name, without importing trl."""
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "chat_templates"
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))}


NAMES_OF_TEMPLATES = [name for name in templates() if not name.endswith("_training")]


@cache
def layout(name: str) -> AnswerLayout:
    source = templates()[name]
    controls = tuple(sorted({*CONTROL.findall(source), "</s>"}))
    return AnswerLayout(TemplateProgram(TemplateSettings(source, NAMES, {}, controls, "2026-01-01T00:00:00")))


def job_of(name: str, messages: list[dict], learned: tuple[int, ...]) -> RenderJob:
    tools = [TOOL] if any("tool_calls" in one for one in messages) else []
    return RenderJob(MessageWriter(templates()[name], str).write(messages), False, "", tools, learned)


def forms(messages: list[dict]) -> Iterator[list[dict]]:
    """The messages as they are, with arguments as text, without empty contents, with contents as parts."""
    yield messages
    texts = [{**CALL[0], "function": {**CALL[0]["function"], "arguments": '{"x": 1}'}}]
    yield [{**one, "tool_calls": texts} if "tool_calls" in one else one for one in messages]
    yield [{**one, "tool_calls": texts, "content": None} if "tool_calls" in one else one for one in messages]
    yield [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]


def transformers_text(source: str, messages: list[dict], **options) -> tuple[str, list]:
    """The text by transformers, in the first form of the messages of which nothing is left out."""
    tools, failed = [TOOL] if any("tool_calls" in one for one in messages) else None, None
    said = [one["content"].split("</think>")[-1].strip() for one in messages]
    names = ["find"] * any("tool_calls" in one for one in messages)
    found = []
    for form in forms(messages):
        try:
            texts, spans = chat_template_utils.render_jinja_template(
                conversations=[form], tools=tools, chat_template=source, **NAMES, **options
            )
        except Exception as error:
            failed = error
            continue
        found.append((texts[0], spans[0] if spans else []))
        if all(text in texts[0] for text in (*said, *names)):
            return found[-1]
    if not found:
        raise ValueError("refused in every form") from failed
    return found[0]


def trl_target_text(name: str, messages: list[dict]) -> str:
    """What TRL learns of the last message."""
    source = templates()[f"{name}_training"]
    text, spans = transformers_text(source, messages, return_assistant_tokens_mask=True)
    before = len(transformers_text(source, messages[:-1])[0])
    return "".join(text[begin:end] for begin, end in spans if end > before)


@pytest.mark.parametrize("name", [name for name in NAMES_OF_TEMPLATES if f"{name}_training" in templates()])
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.filterwarnings("ignore")
def test_each_answer_is_learned_as_trls_training_form_marks_it(name: str, kind: str) -> None:
    for place, message in enumerate(ROWS[kind]):
        if message["role"] != "assistant":
            continue
        messages = ROWS[kind][: place + 1]
        rows, error = render_job(layout(name), job_of(name, messages, (place,)))
        try:
            theirs = trl_target_text(name, messages).strip()
            prompt = transformers_text(templates()[name], messages[:-1], add_generation_prompt=True)[0]
        except Exception:  # the published template refuses it
            assert error
            continue
        if error:  # refused by us alone: TRL would learn an answer from which the template has left something out
            assert "does not write" in error
            assert "find" not in theirs if message.get("tool_calls") else message["content"] not in theirs
            continue
        (begin, end), text = rows[-1].spans[-1], rows[-1].text
        ours = text[begin:end].strip()
        thought = f"h{place // 2 + 1}" if "two" in kind else "hm"
        if thought in ours and thought not in theirs:  # TRL's form drops the reasoning of DeepSeek's answers
            assert ours.split("</think>")[1].strip() in theirs
            continue
        ours = ours.removesuffix("<|tool_response>")  # at which generation by Gemma stops
        if theirs and ours.endswith(theirs) and text[:begin] == prompt:
            continue  # Gemma's prompt after a function's result has no header, which a written answer has
        seam, _, stop = theirs.rpartition(ours)
        assert ours in theirs, (ours, theirs)
        assert prompt.rstrip().endswith(seam.strip()) or text[:begin].rstrip().endswith(seam.strip())
        assert stop in ("", "<|user|>", "<|observation|>")  # GLM: what would follow ends an answer


@pytest.mark.parametrize("name", NAMES_OF_TEMPLATES)
@pytest.mark.filterwarnings("ignore")
def test_every_published_template_lays_out_answers(name: str) -> None:
    for kind in ("one answer", "reasoning", "two answers", "two with reasoning"):
        messages = ROWS[kind]
        places = tuple(n for n, one in enumerate(messages) if one["role"] == "assistant")
        rows, error = render_job(layout(name), job_of(name, messages, places))
        assert not error
        learned = [row.text[begin:end] for row in rows for begin, end in row.spans]
        assert len(learned) == len(places)
        for place, answer in zip(places, learned, strict=True):
            assert messages[place]["content"].split("</think>")[-1].strip() in answer
            for other in (*places, *(n for n in range(len(messages)) if n not in places)):
                if other != place:
                    assert messages[other]["content"][-2:] not in answer


@pytest.mark.parametrize("name", NAMES_OF_TEMPLATES)
@pytest.mark.filterwarnings("ignore")
def test_the_words_around_answers_give_the_spans_of_the_definition(name: str) -> None:
    fast = layout(name)
    for kind in ("one answer", "two answers", "a system message"):
        places = tuple(n for n, one in enumerate(ROWS[kind]) if one["role"] == "assistant")
        job = job_of(name, ROWS[kind], places)
        if render_job(fast, job)[1]:
            continue
        exact, found = fast.by_definition(job), fast.lay_out(job)
        assert [(row.text, [row.text[a:b].rstrip() for a, b in row.spans]) for row in found] == [
            (row.text, [row.text[a:b].rstrip() for a, b in row.spans]) for row in exact
        ]
