"""However many mistakes there are and however long they are, a message has one to four lines; `problems` has all."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from llm_quest.cli.main import app
from llm_quest.cli.output import failure_lines, run_with_exit_code
from llm_quest.errors import LONGEST_LINE, MAX_MESSAGE_LINES, DataError, UsageError


@pytest.mark.parametrize("seed", range(40))
def test_any_message_has_one_to_four_readable_lines(seed: int) -> None:
    generator = random.Random(seed)
    lengths = [
        generator.choice([1, 30, 299, 300, 301, 700, 1500]) for _ in range(generator.choice([1, 2, 3, 4, 5, 9, 400]))
    ]
    problems = [
        (f"problem {number}: " + "word " * (length // 5))[: length - 4].rstrip() + " end"
        for number, length in enumerate(lengths)
    ]
    error = DataError("\n".join(problems), list_all="quest inspect lists all")
    lines = failure_lines(error)
    assert 1 <= len(lines) <= MAX_MESSAGE_LINES
    assert max(map(len, lines)) <= LONGEST_LINE + len("quest: ")
    assert list(error.problems) == problems
    told = " ".join(line.removeprefix("quest: ") for line in lines)
    if sum(lengths) < 4 * LONGEST_LINE - 300 and len(problems) == 1:
        assert told == problems[0], "what has room is told whole"
    if len(problems) > MAX_MESSAGE_LINES:
        assert told.endswith(f"... and {len(problems) - 3} more; quest inspect lists all")
        assert told.count(" end") == 3, "the end of each, where the cure stands, is shown"


def test_a_line_of_megabytes_is_cut() -> None:
    lines = failure_lines(UsageError("a" * 10**7 + ": write b"))
    assert len(lines) == 1
    assert lines[0].endswith("a: write b")


RECIPE = """
recipe: sft
batch_sizes: 2
learning_rate: x
max_step: 3
data: {sorce: a, held_out: 7}
samples: {promts: [a]}
optim: sgdd
logging_steps: true
model: {loda: a}
"""
ROWS = [
    {"prompt": "a", "completion": "b"}, {"prompt": "a"}, {"prompt": 1, "completion": "b"}, {"text": "a"}, [], 7,
    {"messages": [{"role": "judge", "content": "a"}]}, {"messages": []}, {"messages": "a"}, {"chosen": "a"},
]  # fmt: skip


def message_and_problems(
    arguments: list[str], patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[list[str], list[str]]:
    """The lines of a command's message, without progress, and the problems of its JSON."""
    patch.setattr(sys, "argv", ["quest", *arguments, "--json"])
    capsys.readouterr()
    assert run_with_exit_code(lambda: app(prog_name="quest")) in (2, 3)
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    lines = error["message"].splitlines()
    assert said.err.endswith(error["message"] + "\n")
    assert 1 <= len(lines) <= MAX_MESSAGE_LINES, lines
    assert max(map(len, lines)) <= LONGEST_LINE + len("quest: ")
    return lines, error["problems"]


def test_nine_mistakes_of_a_recipe_are_four_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    lines, problems = message_and_problems(["train", str(tmp_path / "mine.yaml"), "--dry-run"], monkeypatch, capsys)
    assert len(problems) >= 9, problems
    assert lines[-1] == f"quest: ... and {len(problems) - 3} more; --json lists all"
    for key in (
        "batch_sizes",
        "learning_rate",
        "max_step",
        "sorce",
        "held_out",
        "promts",
        "optim",
        "logging_steps",
        "loda",
    ):
        assert any(f"{key}: " in problem and "mine.yaml:" in problem for problem in problems), key


def test_rows_with_eight_faults_are_four_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sizes = "hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8"
    settings = [f"data.source={file}", "data.strict=true", "max_steps=1", "threads=1", "device=cpu"]
    settings.append(f"model={{family: llama, config: {{{sizes}}}}}")
    lines, problems = message_and_problems(
        ["train", "sft", *settings, "--out", str(tmp_path / "run")], monkeypatch, capsys
    )
    assert "9 rows cannot be used" in lines[0]
    assert lines[-1].endswith("more; --json lists all")
    for number in range(2, len(ROWS) + 1):
        assert any(f"{file}:{number}: " in one or f":{number}" in one for one in problems), (number, problems)
