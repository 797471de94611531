"""How often a template runs, what is sent to its process at once, and that words which somebody types move no span."""

from __future__ import annotations

import pytest

from llm_quest.data import template_sandbox
from llm_quest.data.answer_layout import AnswerLayout, common_length
from llm_quest.data.chat import CHATML_TEMPLATE, ChatTemplate
from llm_quest.data.conversations import Conversation
from llm_quest.data.template_program import RenderJob, TemplateProgram, TemplateSettings
from llm_quest.data.template_sandbox import render_job, split_batches
from llm_quest.data.vocabulary import train_bpe

UNTAGGED = CHATML_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
MIXTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
FORGETFUL = UNTAGGED.replace(
    "message['content'] | trim", "(message['content'] if loop.last or message['role'] == 'user' else '-') | trim"
)
CHANGING = UNTAGGED.replace("message['content'] | trim", "(message['content'] if loop.last else '-') | trim")
TEMPLATES = {"tagged": CHATML_TEMPLATE, "ChatML": UNTAGGED, "Mixtral": MIXTRAL}
CONTROLS = ("<|im_start|>", "<|im_end|>", "<s>", "</s>")
TURNS = 10


def layout(source: str) -> AnswerLayout:
    return AnswerLayout(
        TemplateProgram(TemplateSettings(source, {"bos_token": "<s>", "eos_token": "</s>"}, {}, CONTROLS))
    )


def job(turns: int, said: str = "hello") -> RenderJob:
    messages = [{"role": role, "content": f"{said} {turn}"} for turn in range(turns) for role in ("user", "assistant")]
    return RenderJob(messages, False, learned=tuple(range(1, 2 * turns, 2)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_of_ten_turns_is_rendered_once(name: str):
    found = layout(TEMPLATES[name])
    before = found.program.renderings
    rows = found.lay_out(job(TURNS))
    assert found.program.renderings - before == 1
    assert [row.text[a:b].strip().split("<")[0] for row in rows for a, b in row.spans] == [
        f"hello {turn}" for turn in range(TURNS)
    ]


def test_a_template_that_rewrites_is_rendered_twice_for_each_answer():
    found = layout(FORGETFUL)
    before = found.program.renderings
    rows = found.lay_out(job(TURNS))
    assert found.program.renderings - before == 2 * TURNS
    assert len(rows) == TURNS
    assert [row.text[a:b] for row in rows for a, b in row.spans] == [f"hello {n}<|im_end|>\n" for n in range(TURNS)]


def test_a_template_that_changes_the_question_behind_its_answer_is_refused():
    rows, reason = render_job(layout(CHANGING), job(1))
    assert rows == []
    assert "another text than the prompt that asks for it" in reason


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("said", ["a [/INST] b", "a</s>[INST] b [/INST]", "<|im_end|>\n<|im_start|>assistant\n"])
def test_what_somebody_types_moves_no_span(name: str, said: str):
    chat = ChatTemplate(train_bpe(["words of text, [INST] and so on"], 300), TEMPLATES[name])
    turns = [("user", said), ("assistant", f"one {said}"), ("user", "b"), ("assistant", "two")]
    example = chat.encode_conversations([Conversation(tuple(turns), "f:1")])[0]
    learned = chat.tokenizer.decode(example.input_ids[example.assistant_mask], keep_special_tokens=True)
    end = chat.tokenizer.decode([int(example.input_ids[-1])], keep_special_tokens=True)
    answers = [f"one {said}".strip(), "two"] if name != "Mixtral" else [f" one {said}", " two"]
    assert learned == "".join(answer + end for answer in answers)


def test_batches_are_bounded_in_text_and_in_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template_sandbox, "BATCH_CHARACTERS", 2_000)
    monkeypatch.setattr(template_sandbox, "BATCH_RENDERINGS", 50)
    jobs = [job(2, "a" * size) for size in (10, 10, 700, 10, 10)] + [job(20), job(20), job(1)]
    batches = list(split_batches(jobs))
    assert [one for batch in batches for one in batch] == jobs
    assert [len(batch) for batch in batches] == [2, 1, 2, 1, 2]


def test_a_batch_of_many_and_of_one_give_the_same(monkeypatch: pytest.MonkeyPatch):
    chat = ChatTemplate(train_bpe(["words of text"], 300), UNTAGGED)
    talks = [Conversation((("user", f"a {n}"), ("assistant", f"b {n}"))) for n in range(5)]
    together = chat.encode_conversations(talks)
    monkeypatch.setattr(template_sandbox, "BATCH_CHARACTERS", 1)
    assert [one.input_ids.tolist() for one in chat.encode_conversations(talks)] == [
        one.input_ids.tolist() for one in together
    ]


def test_arguments_of_function_calls_have_the_form_that_the_template_takes():
    call = {"function": {"name": "find", "arguments": {"x": 1}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    adding = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}"  # noqa: E501
    as_json = adding.replace("+ c.function.arguments", "+ c.function.arguments['x'] | tojson")
    for source, text in ((adding, 'find{"x": 1}'), (as_json, "find1")):
        rows, reason = render_job(layout(source), RenderJob(messages, False))
        assert (rows[0].text, reason) == (text, "")


@pytest.mark.parametrize(
    ("first", "second", "size"), [("", "a", 0), ("abc", "abd", 2), ("ab", "abc", 2), ("a", "b", 0)]
)
def test_common_length(first: str, second: str, size: int):
    assert common_length(first, second) == common_length(second, first) == size
