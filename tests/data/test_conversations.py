"""Rows of every form become one form, mistakes stop with file and line, and a question stays on one side."""

import json
from pathlib import Path

import pytest

from llm_quest.data.conversations import Conversation, parse_conversation, read_conversations, split_by_prompt
from llm_quest.data.document import DropReport
from llm_quest.data.messages import Message
from llm_quest.data.records import Record, read_records
from llm_quest.errors import DataError

ASKED = (Message("user", "2+2?"), Message("assistant", "4"))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"instruction": "2+2?", "output": "4", "chosen": "ignored"},
        {"question": "2+2?", "answer": "4"},
    ],
)
def test_every_form_of_row_is_one_conversation(row):
    assert read_conversations([Record(row, "f:1")], DropReport())[0].messages == ASKED


def test_an_alpaca_rows_input_stands_below_its_instruction():
    found = read_conversations([Record({"instruction": "Add.", "input": "2, 2", "output": "4"}, "f:1")], DropReport())
    assert found[0].prompt == [{"role": "user", "content": "Add.\n\n2, 2"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, r"keys text; expected .* \(such rows are for pretrain\)"),
        ({"prompt": "a", "completion": None}, "keys prompt; expected"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "message 2: has no 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of its content is"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "weight is 0.5; expected 0, 1"),
        ({"prompt": "a", "completion": "b", "tools": "x"}, "tools is 'x'; expected a list"),
        ({"instruction": "a", "output": "b", "history": ["a"]}, r"no list of pairs \[question, answer\]"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the roles are user; expected"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the roles are assistant"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]},
            "the roles are user, tool",
        ),
        ({"messages": [{"role": "user", "content": [1]}]}, "message 1: a part of its content is 1"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "message 1: has the role 'narrator'; known: system"),
        ({"messages": "hello"}, "messages is a str"),
        ({"messages": []}, "the roles are \\(none\\)"),
        ({"prompt": "a", "completion": 4}, "'completion' is a int"),
        ({"prompt": [{"role": "user", "content": "a"}] * 2, "completion": "b"}, "the roles are user, user, assistant"),
    ],
)
def test_a_row_that_is_wrong_stops_with_file_and_line(row, said):
    with pytest.raises(DataError, match=f"^f:7.*{said}"):
        parse_conversation(Record(row, "f:7"))


def test_an_empty_answer_is_dropped_and_counted():
    ledger = DropReport()
    rows = [Record({"prompt": "a", "completion": text}, "f") for text in ("", " \n", "b")]
    assert len(read_conversations(rows, ledger)) == 1
    assert ledger.dropped["empty answer"][0] == 2


def test_rows_of_a_list_carry_their_lines(tmp_path: Path):
    file = tmp_path / "rows.json"
    file.write_text('[\n {"a": 1},\n\n {"a":\n 2},\n {"a": 3} ]\n')
    assert [record.where.rsplit(":", 1)[1] for record in read_records(file)] == ["2", "4", "6"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '[\n{"a": 1}\n{"a": 2}]', ":2: after this object"),
        ("a.json", '[\n{"a": 1},\n{"a": oops}]', ":3 is not JSON"),
        ("a.json", '"a"', "does not begin with"),
        ("a.json", "[1]", ":1: holds a int"),
        ("a.json", '[{"a": 1}', ":1: after this object"),
        ("a.json", "[]", "holds no rows"),
        ("a.jsonl", '{"a": 1}\n\nnope\n', ":3: is not JSON"),
        ("a.csv", "a,b\n1,2\n3\n", ":3: has 1 cells, the first line names 2"),
        ("a.txt", "hello", "rows are read from"),
    ],
)
def test_a_broken_file_stops_with_its_line(tmp_path: Path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        read_records(tmp_path / name)


def test_a_table_and_json_lines_give_the_same_rows(tmp_path: Path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"two\nlines"\tx\n')
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "two\nlines", "label": "x"}))
    assert read_records(tmp_path / "a.tsv")[0].row == read_records(tmp_path / "a.jsonl")[0].row


def test_the_same_question_is_never_on_both_sides_whatever_its_order():
    items = [Conversation((("user", f"Q {n % 40}"), ("assistant", str(n)))) for n in range(120)]
    items += [Conversation((("user", f"  q\n{n}"), ("assistant", "again"))) for n in range(40)]
    train, held = split_by_prompt(items, 0.2)
    assert len(train) + len(held) == 160
    assert 32 <= len(held) <= 36
    asked = [{" ".join(one.prompt[0]["content"].lower().split()) for one in side} for side in (train, held)]
    assert not asked[0] & asked[1]
    assert set(split_by_prompt(items[::-1], 0.2)[1]) == set(held)


def test_rows_of_one_question_cannot_be_split():
    with pytest.raises(DataError, match="1 different questions are too few"):
        split_by_prompt([Conversation((("user", "a"), ("assistant", str(n)))) for n in range(9)], 0.1)


@pytest.mark.parametrize("row", ['{"prompt": "a", "completion": "b\\ud83d"}', '{"messages": [{"content": "\\udc00"}]}'])
def test_half_of_a_surrogate_pair_is_named_with_its_line(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "emoji \\ud83d\\ude00", "completion": "b"}\n' + row)
    with pytest.raises(DataError, match=r"a\.jsonl:2: .* is half of a surrogate pair alone"):
        read_records(tmp_path / "a.jsonl")


def test_a_line_of_a_table_ends_at_its_line_end_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\r\none\u2028two,b\r\n", encoding="utf-8", newline="")
    assert [record.row["prompt"] for record in read_records(tmp_path / "a.csv")] == ["one\u2028two"]
