"""`quest data`: the forms of rows, and what a recipe would read of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_quest.cli.data import summarize_rows
from llm_quest.cli.main import app
from llm_quest.data.row_forms import ROW_FORMS
from llm_quest.errors import DataError, UsageError

ROWS = [
    {"prompt": "a", "completion": "b", "id": 1},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "likes": 3}]},
    {"instruction": "a", "output": "b", "history": []},
    {"text": "no conversation"},
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_a_file_is_summarized_as_a_recipe_reads_it(rows: Path) -> None:
    done = CliRunner().invoke(app, ["data", str(rows), "--recipe", "sft"])
    assert done.exit_code == 0
    for said in (
        "1 rows: prompt and completion", "1 rows: messages", "1 rows: Alpaca", "skipped: 1 row cannot be used",
        f"{rows}:4: has the keys text", "id (1), messages[].likes (1)",
    ):  # fmt: skip
        assert said in " ".join(done.output.split()), said
    found = summarize_rows(str(rows), "sft").as_json()
    assert found["skipped"]["kinds"] == {"no known form": 1}


def test_a_file_without_a_row_of_the_recipe_and_a_recipe_without_rows_are_told(rows: Path) -> None:
    with pytest.raises(DataError, match="4 rows cannot be used"):
        summarize_rows(str(rows), "dpo")
    with pytest.raises(UsageError, match="vit reads no rows of a known form; known: pretrain, sft"):
        summarize_rows(str(rows), "vit")


def test_the_forms_are_listed() -> None:
    done = CliRunner().invoke(app, ["data", "--forms", "--json"])
    assert {one["recipe"] for one in json.loads(done.output)} == set(ROW_FORMS)
    assert "Alpaca" in CliRunner().invoke(app, ["data", "--forms"]).output


def test_columns_of_other_names_are_mapped_as_a_recipe_would(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,good,bad\na,b,c\n")
    words = ["data", str(tmp_path / "a.csv"), "--columns", "{prompt: q, chosen: good, rejected: bad}"]
    done = CliRunner().invoke(app, [*words, "--recipe", "dpo"])
    assert done.exit_code == 0, done.exception
    assert "1 rows: prompt, chosen, rejected" in done.stdout
    assert "without SOURCE and --recipe" in str(CliRunner().invoke(app, words).exception)
    wrong = CliRunner().invoke(app, [*words[:2], "--recipe", "dpo", "--columns", "q"])
    assert "give keys and columns" in str(wrong.exception)
