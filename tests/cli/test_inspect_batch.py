"""`quest inspect-batch` shows what is learned, and shows it clean."""

from __future__ import annotations

import re

import pytest

from llm_quest.cli.inspect_batch import GREEN, RESET, load_batch_view
from llm_quest.errors import UsageError
from tests.recipes.tuned import base, write_rows


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("look")
    rows = [
        {"prompt": f"say {word} \x1b[31m", "completion": word, "chosen": word, "rejected": "no", "text": f"say {word}"}
        | {"label": "early" if word < "e" else "late"}
        for word in "abcdefgh"
    ]
    start = base(folder / "model")
    return [f"model.load={start}", f"data.source={write_rows(folder / 'rows.jsonl', rows)}", "sequence_length=64"]


def test_answers_stand_between_brackets_or_in_green_and_no_escape_sequence_survives(pairs: list[str]):
    found = load_batch_view("sft", pairs, step=0, rows=2, log=print)
    lines = found.lines()
    assert "2 rows of 64 tokens" in lines[0]
    assert all(line.count("[[") == 1 and line.endswith("<|im_end|>]]") for line in lines[1:])
    assert lines[1].startswith("row 0, document 0, positions 0..")
    colored = "\n".join(found.lines(color=True)).replace(GREEN, "").replace(RESET, "")
    assert "\x1b" not in colored + "".join(lines)


def test_json_tells_every_token_with_position_and_document(pairs: list[str]):
    told = load_batch_view("sft", pairs, step=1, rows=1, log=print).as_json()["documents"]
    assert [one["document"] for one in told] == list(range(len(told)))
    tokens = told[0]["tokens"]
    assert [one["position"] for one in tokens] == list(range(len(tokens)))
    assert [one["learned"] for one in tokens[-2:]] == [True, True]
    assert tokens[-1]["text"] == "<|im_end|>"
    assert not any(one["learned"] for one in tokens[:-2])


def test_preferences_say_which_row_is_the_better_and_that_both_answers_are_learned(pairs: list[str]):
    lines = load_batch_view("dpo", pairs, step=0, rows=2, log=print).lines()
    assert "(better)" in lines[1]
    assert "say " in lines[2]
    assert "[[no<|im_end|>]]" in lines[2]
    assert ", positions 0.." in lines[2]


def test_a_reward_is_read_at_the_answers_end(pairs: list[str]):
    lines = load_batch_view("reward", pairs, step=0, rows=2, log=print).lines()
    assert "2 read, between [[ and ]]" in lines[0]
    assert "(worse)" in lines[2]
    assert "no[[<|im_end|>]]" in lines[2]


def test_a_text_says_its_label_and_is_read_at_its_last_token(pairs: list[str]):
    found = load_batch_view("classify", pairs, step=0, rows=4, log=print)
    lines = found.lines()
    assert "4 read, between [[ and ]]" in lines[0]
    for line in lines[1:]:
        word = line[-3]
        assert f"label {'early' if word < 'e' else 'late'}," in line
        assert re.search(rf"positions 0\.\.\d: say ?\[\[ ?{word}\]\]$", line)
    tokens = found.as_json()["documents"][0]["tokens"]
    assert [one["read"] for one in tokens] == [False] * (len(tokens) - 1) + [True]


def test_a_recipe_without_rows_of_tokens_is_refused():
    with pytest.raises(UsageError, match="not of vit"):
        load_batch_view("vit", [], step=0, rows=1, log=print)
