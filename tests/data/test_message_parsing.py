"""Every spelling of a message, what of it is learned, and one odd row among good ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_quest.data.chat import ChatTemplate
from llm_quest.data.conversations import parse_conversation, read_conversations
from llm_quest.data.document import DropReport
from llm_quest.data.messages import EXTRA_MESSAGE_KEYS, Message
from llm_quest.data.preferences import read_preferences
from llm_quest.data.records import Record
from llm_quest.data.sources import DataSource, load_rows
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import DataError


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "assistant", "content": "a"}, Message("assistant", "a")),
        ({"from": "gpt", "value": "a"}, Message("assistant", "a")),
        ({"from": "bot", "value": "a"}, Message("assistant", "a")),
        ({"role": "model", "content": "a"}, Message("assistant", "a")),
        ({"role": "assistant", "content": [{"type": "text", "text": "a"}, "b"]}, Message("assistant", "ab")),
        ({"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}, Message("assistant", "a")),
        (
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            Message("assistant", "ab"),
        ),
        ({"role": "assistant", "content": "a", "weight": 0}, Message("assistant", "a", train=False)),
        ({"role": "assistant", "content": "a", "weight": 1}, Message("assistant", "a")),
        ({"role": "assistant", "content": "a", "train": False}, Message("assistant", "a", train=False)),
        ({"role": "assistant", "content": "a", "train": True, "weight": 0}, Message("assistant", "a", train=False)),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            Message("assistant", "", extra={"tool_calls": [CALL]}),
        ),
        (
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            Message("assistant", "", extra={"tool_calls": [CALL]}),
        ),
        (
            {"from": "function_call", "value": json.dumps([CALL["function"]] * 2)},
            Message("assistant", "", extra={"tool_calls": [CALL, CALL]}),
        ),
        (
            {"role": "assistant", "content": None, "function_call": CALL["function"]},
            Message("assistant", "", extra={"tool_calls": [CALL]}),
        ),
        (
            {"role": "assistant", "content": "a", "function_call": json.dumps(CALL["function"])},
            Message("assistant", "a", extra={"tool_calls": [CALL]}),
        ),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "because"},
            Message("assistant", "a", extra={"reasoning_content": "because"}),
        ),
    ],
)
def test_every_spelling_of_an_answer_is_one_message(message: dict[str, Any], expected: Message) -> None:
    assert parse_conversation(Record({"messages": [user("q"), message]}, "f:1")).messages[-1] == expected


@pytest.mark.parametrize("key", EXTRA_MESSAGE_KEYS)
def test_a_key_for_the_chat_template_reaches_it(key: str) -> None:
    report = DropReport()
    value = [CALL] if key == "tool_calls" else "a text"
    row = {"messages": [user("q"), assistant("a", **{key: value}), user("q"), assistant("b")]}
    [found] = read_conversations([Record(row, "f:1")], report)
    assert found.message_dicts[1][key] == value
    assert not report.unused_keys


@pytest.mark.parametrize(
    ("role", "name"), [("developer", "system"), ("Human", "user"), (" USER ", "user"), ("human", "user")]
)
def test_other_names_of_roles(role: str, name: str) -> None:
    turns = [{"role": role, "content": "x"}, user("q"), assistant("a")][1 if name == "user" else 0 :]
    turns[0] = {"role": role, "content": "x"}
    assert parse_conversation(Record({"messages": turns}, "f:1")).messages[0] == Message(name, "x")


@pytest.mark.parametrize("answer", ["tool", "observation", "function", "ipython"])
def test_a_tools_answer_stands_between_two_of_the_assistants(answer: str) -> None:
    turns = [user("2+2?"), assistant("", tool_calls=[CALL]), {"role": answer, "content": "4"}, assistant("It is 4.")]
    found = parse_conversation(Record({"messages": turns, "tools": json.dumps([CALL])}, "f:1"))
    assert [one.role for one in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.tools == (CALL,)


def test_the_calls_and_functions_that_openai_had_before_tools_are_read() -> None:
    report = DropReport()
    called = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [user("2+2?"), called, {"role": "function", "name": "add", "content": "4"}, assistant("It is 4.")]
    schema = {"name": "add", "parameters": {"type": "object"}}
    [found] = read_conversations([Record({"messages": turns, "functions": [schema]}, "f:1")], report)
    assert found.message_dicts[1]["tool_calls"][0]["function"] == called["function_call"]
    assert found.message_dicts[2] == {"role": "tool", "content": "4", "name": "add"}
    assert found.tools == ({"type": "function", "function": schema},)
    assert not report.unused_keys


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ({"type": "function_call", "name": "add", "arguments": "{}"}, "an item of type 'function_call'"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "a content part 'refusal'"),
        ({"role": "assistant", "content": "", "function_call": "add(2)"}, "a function call of another form"),
        (assistant("", function_call=CALL["function"], tool_calls=[CALL]), "two kinds of calls"),
    ],
)
def test_messages_of_other_forms_are_refused_by_name(message: dict[str, Any], kind: str) -> None:
    report = DropReport()
    assert not read_conversations([Record({"messages": [user("q"), message]}, "f:1")], report)
    assert list(report.skipped) == [kind]


def test_messages_that_a_table_holds_as_text_are_read() -> None:
    row = {"messages": json.dumps([user("q"), assistant("a")])}
    assert parse_conversation(Record(row, "f:1")).answer == "a"


def test_messages_after_the_last_answer_are_left_out_and_told() -> None:
    report = DropReport()
    rows = [Record({"messages": [user("q"), assistant("a"), user("and?")]}, f"f:{n}") for n in (1, 2)]
    assert [one.answer for one in read_conversations(rows, report)] == ["a", "a"]
    assert report.unused_keys == {"(messages after the last answer)": 2}


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate(train_bpe(["words " * 50], 300))


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ({"messages": [user("a"), assistant("b"), user("c")]}, True),
        ({"messages": [user("a"), assistant(""), {"role": "tool", "content": "1"}, assistant("b")]}, True),
        ({"messages": [{"role": "developer", "content": "x"}, user("a"), assistant("b")]}, True),
        ({"instruction": "a", "input": None, "output": "b"}, True),
        ({"prompt": "a", "completion": "word " * 240_000}, True),
        ({"messages": [assistant("hi"), user("a"), assistant("b")]}, False),
        ({"messages": [user("a"), user("b"), assistant("c")]}, False),
        ({"prompt": "a", "completion": None}, False),
        ({"prompt": "a", "completion": " "}, False),
        ({"messages": [user("a"), assistant("b", weight=0)]}, False),
    ],
    ids=["ends with the user", "a tool", "developer", "input is null", "1.2 million characters", "begins with the "
         "assistant", "two users", "answer is null", "empty answer", "nothing to learn"],
)  # fmt: skip
def test_one_odd_row_among_good_ones_does_not_end_a_run(
    chat: ChatTemplate, tmp_path: Path, row: dict[str, Any], kept: bool
) -> None:
    good = {"messages": [user("a"), assistant("b")]}
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [good, good, row, good])))
    report = DropReport()
    found = load_rows([DataSource(str(file))], read_conversations, report)
    assert len(chat.encode_conversations(found, report)) == 3 + kept
    said = report.skipped or report.dropped or report.unused_keys
    assert kept or said
    assert not report.skipped or f"{file}:3: " in report.skipped_rows[0]


def test_a_message_that_is_not_to_be_learned_is_not(chat: ChatTemplate) -> None:
    turns = [user("a"), assistant("WRONG", weight=0), user("c"), assistant("d")]
    [example] = chat.encode_conversations([parse_conversation(Record({"messages": turns}, "f:1"))])
    assert "WRONG" not in chat.tokenizer.decode(example.input_ids[example.assistant_mask].tolist())


def test_where_every_pair_says_nothing_that_is_what_is_told(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "a", "chosen": "x", "rejected": "x"}))
    with pytest.raises(DataError, match=r"no row is left to learn from \(1 x chosen and rejected are the same\)"):
        load_rows([DataSource(str(file))], read_preferences, DropReport())


@pytest.mark.parametrize(
    ("row", "question", "answers"),
    [
        (
            {"chosen": "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant: good", "rejected": "\n\nHuman: a?"
             "\n\nAssistant: b\n\nHuman: c?\n\nAssistant: bad"},
            ["a?", "b", "c?"], ("good", "bad"),
        ),
        ({"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}, ["s", "q"], ("good", "bad")),
        (
            {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
             "rejected": {"from": "gpt", "value": "bad"}},
            ["q"], ("good", "bad"),
        ),
        ({"instruction": "q", "output": ["good", "bad"]}, ["q"], ("good", "bad")),
        (
            {"prompt": "q", "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
            ["q"], ("good", "bad"),
        ),
    ],
    ids=["hh-rlhf", "orca", "LLaMA-Factory", "list of outputs", "whole conversations beside the prompt"],
)  # fmt: skip
def test_published_forms_of_preferences(row: dict[str, Any], question: list[str], answers: tuple[str, ...]) -> None:
    [found] = read_preferences([Record(row, "f:1")], DropReport())
    assert [one.content for one in found.question] == question
    assert found.answers == answers


def test_reasoning_of_a_preferred_answer_is_named_as_not_read() -> None:
    report = DropReport()
    row = {"prompt": "q", "chosen": [assistant("good", reasoning_content="x")], "rejected": "bad", "score_chosen": 9.0}
    assert read_preferences([Record(row, "f:1")], report)
    assert report.unused_keys == {"chosen[].reasoning_content": 1, "score_chosen": 1}


def test_keys_that_a_chat_template_does_not_write_are_told(chat: ChatTemplate) -> None:
    turns = [user("q") | {"name": "Ann"}, assistant("a")]
    found = [parse_conversation(Record({"messages": turns, "tools": [CALL]}, f"f:{n}")) for n in range(2)]
    report = DropReport()
    chat.encode_conversations(found, report)
    told = [f"2 conversations have {key}, which this chat template does not write" for key in ("name", "tools")]
    assert [note for note in report.notes if "does not write" in note] == told
