"""`quest data`: the forms of rows, and what a recipe would read of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
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
    with pytest.raises(UsageError, match="iterative reads no rows of a known form; known: pretrain, sft"):
        summarize_rows(str(rows), "iterative")
    with pytest.raises(DataError, match="is no folder of images"):
        summarize_rows(str(rows), "vit")


def draw(file: Path, color: int = 9) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), color).save(file)


def test_a_folder_of_images_is_summarized_as_vit_reads_it(tmp_path: Path) -> None:
    for number in range(3):
        draw(tmp_path / "cat" / f"{number}.png", number)
    draw(tmp_path / "dog" / "deeper" / "a.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".thumbnails").mkdir()
    draw(tmp_path / ".thumbnails" / "a.png")
    done = CliRunner().invoke(app, ["data", str(tmp_path), "--recipe", "vit"])
    assert done.exit_code == 0, done.exception
    told = " ".join(done.output.split())
    for said in (
        "4 images: a part of them is held out 3 cat 1 dog", "left out: 1 files that are no images",
        "left out: 1 hidden files",
    ):  # fmt: skip
        assert said in told, said
    assert summarize_rows(str(tmp_path), "vit").as_json()["dropped"] == {
        "hidden files": 1,
        "files that are no images": 1,
    }
    (tmp_path / "dog" / "cut.png").write_bytes((tmp_path / "cat" / "0.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"cut\.png"):
        summarize_rows(str(tmp_path), "vit")


def test_both_parts_of_an_image_folder_and_a_table_of_labels_are_summarized(tmp_path: Path) -> None:
    for part, labels in (("train", ("a", "b")), ("val", ("a",))):
        for label in labels:
            draw(tmp_path / "parts" / part / label / "1.png")
    found = summarize_rows(str(tmp_path / "parts"), "vit").as_json()
    assert found["images"] == {"to train on": 2, "held out": 1}
    assert found["labels"]["held out"] == {"a": 1, "b": 0}
    draw(tmp_path / "parts" / "val" / "new" / "1.png")
    with pytest.raises(DataError, match="the class 'new', which the training images have not"):
        summarize_rows(str(tmp_path / "parts"), "vit")
    draw(tmp_path / "table" / "1.png")
    (tmp_path / "table" / "metadata.csv").write_text('image,labels\n1.png,"[""x"", ""y""]"\n2.png,x\n')
    told = summarize_rows(str(tmp_path / "table"), "vit", {"file_name": "image"})
    assert told.as_json()["labels"] == {"a part of them is held out": {"x": 1, "y": 1}}
    assert "skipped: 1 row cannot be used (1 x an image that is missing)" in " ".join(told.lines())


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
