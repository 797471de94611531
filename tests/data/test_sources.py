"""Where rows come from: several files with weights, data sets of the hub, functions in Python files; columns."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from llm_quest.data.conversations import Conversation, read_conversations
from llm_quest.data.corpus import load_corpus
from llm_quest.data.document import DropReport
from llm_quest.data.loader import repeat_by_weight
from llm_quest.data.preferences import read_preferences
from llm_quest.data.prompt_rows import read_prompt_rows
from llm_quest.data.records import iter_records
from llm_quest.data.row_forms import ROW_FORMS
from llm_quest.data.sources import DataSource, absolute_source, checked, load_rows
from llm_quest.data.step_labels import read_labeled_steps
from llm_quest.data.text_classification import read_labeled_texts
from llm_quest.data.unpaired import read_unpaired
from llm_quest.errors import DataError, MissingError, QuestError, UsageError

ROWS = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(4)]


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def load(*sources: DataSource, report: DropReport | None = None, **options: Any) -> list[Conversation]:
    return load_rows(sources, read_conversations, DropReport() if report is None else report, **options)


def test_a_weight_says_how_often_a_row_is_seen() -> None:
    rows = [
        Conversation((("user", str(n)), ("assistant", "a")), "f", weight=weight) for n in range(4) for weight in (1, 2)
    ]
    assert [one.weight for one in repeat_by_weight(rows)].count(2) == 8
    half = [Conversation((("user", str(n)), ("assistant", "a")), "f", weight=0.5) for n in range(10)]
    assert len(repeat_by_weight(half)) == 5
    more = [Conversation((("user", str(n)), ("assistant", "a")), "f", weight=1.5) for n in range(10)]
    assert len(repeat_by_weight(more)) == 15
    assert set(repeat_by_weight(more)) == set(more)


def test_the_rows_of_several_files_carry_their_weights_and_lines(tmp_path: Path) -> None:
    first, second = write_rows(tmp_path / "a.jsonl", ROWS[:2]), write_rows(tmp_path / "b.jsonl", ROWS[2:])
    found = load(DataSource(str(first), weight=2.0), DataSource(str(second)))
    assert [(one.weight, one.where) for one in found] == [
        (2.0, f"{first}:1"), (2.0, f"{first}:2"), (1.0, f"{second}:1"), (1.0, f"{second}:2"),
    ]  # fmt: skip
    texts = write_rows(tmp_path / "t.jsonl", [{"text": "one"}, {"text": "two"}])
    assert [one.weight for one in load_corpus([DataSource(str(texts), 3.0)]).documents] == [3.0, 3.0]


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"q": "2+2?", "reply": "4", "prompt": "old", "level": 3}])
    report = DropReport()
    [found] = load(DataSource(str(file)), report=report, columns={"prompt": "q", "completion": "reply"})
    assert [(one.role, one.content) for one in found.messages] == [("user", "2+2?"), ("assistant", "4")]
    assert report.unused_keys == {"level": 1, "prompt (data.columns gives it another column)": 1}
    with pytest.raises(DataError, match=r"a\.jsonl:1: has no column 'question' \(data\.columns\); it has 'q', 'reply'"):
        load(DataSource(str(file)), columns={"prompt": "question"})
    texts = write_rows(tmp_path / "t.jsonl", [{"body": "one"}])
    assert [one.text for one in load_corpus(texts, columns={"text": "body"}).documents] == ["one"]


def test_bad_rows_are_left_out_or_all_shown(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join([json.dumps(ROWS[0]), '{"x": 1}', "{", json.dumps(ROWS[1])]))
    report = DropReport()
    assert len(load(DataSource(str(file)), report=report)) == 2
    assert dict(report.skipped) == {"not JSON": 1, "no known form": 1}
    assert report.remarks()[0].startswith("skipped: 2 rows cannot be used (1 x ")
    with pytest.raises(DataError) as error:
        load(DataSource(str(file)), strict=True)
    assert {line.split(": ")[0].rpartition(":")[2] for line in str(error.value).splitlines()[1:]} == {"2", "3"}
    assert "data.strict=false" in str(error.value)


def test_a_source_without_a_row_left_says_why(tmp_path: Path) -> None:
    empty = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": " "}])
    with pytest.raises(DataError, match=r"no row is left to learn from \(1 x empty answer\)"):
        load(DataSource(str(empty)))
    wrong = write_rows(tmp_path / "b.jsonl", [{"x": 1}])
    with pytest.raises(DataError, match=r"1 row cannot be used .*; no row is left\n.*b\.jsonl:1: has the keys x"):
        load(DataSource(str(wrong)))


MODULE = """
def rows():
    yield {"prompt": "q0", "completion": "a0"}
    yield ["no row"]
    yield {"prompt": "half \\ud83d", "completion": "b"}
    yield {"prompt": "q1", "completion": "a1"}

def fails():
    yield {"prompt": "q0", "completion": "a0"}
    raise KeyError("nothing")
"""


def test_a_function_of_a_python_file_gives_rows(tmp_path: Path) -> None:
    file = tmp_path / "my_data.py"
    file.write_text(MODULE)
    report = DropReport()
    found = load(DataSource(f"{file}:rows"), report=report)
    assert [one.where for one in found] == [f"{file}:rows:1", f"{file}:rows:4"]
    assert dict(report.skipped) == {"not an object": 1, "half a surrogate pair": 1}
    file.write_text(MODULE + 'def texts():\n    return [{"text": "one"}]\n')
    assert [one.text for one in load_corpus(f"{file}:texts").documents] == ["one"]
    for name, error, said in [
        ("row", UsageError, "has no function 'row'; it has rows, fails, texts"),
        ("fails", DataError, r"my_data\.py:10: fails failed with KeyError: 'nothing'"),
    ]:
        with pytest.raises(error, match=said):
            load(DataSource(f"{file}:{name}"))
    file.write_text("import nowhere_at_all\n")
    with pytest.raises(DataError, match=r"my_data\.py:1: .*ModuleNotFoundError"):
        load(DataSource(f"{file}:rows"))
    file.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(DataError, match=r"my_data\.py:2: rows failed with SystemExit: 3"):
        load(DataSource(f"{file}:rows"))
    with pytest.raises(DataError, match=r"absent\.py does not exist"):
        load(DataSource(f"{tmp_path}/absent.py:rows"))


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in a folder, as `datasets.load_dataset` reads it without a network."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "test.jsonl", [{"prompt": "t", "completion": "u"}])
    return folder


def test_a_data_set_is_loaded_by_datasets_with_its_split(hub_folder: Path) -> None:
    found = load(DataSource(f"hf:{hub_folder}"))
    assert [one.answer for one in found] == ["a0", "a1", "a2", "a3"]
    assert found[1].where == f"hf:{hub_folder}:2"
    assert [one.answer for one in load(DataSource(f"hf:{hub_folder}", split="test"))] == ["u"]
    with pytest.raises(UsageError, match="has no split 'dev'; it has train, test"):
        load(DataSource(f"hf:{hub_folder}", split="dev"))
    with pytest.raises(DataError, match="cannot be loaded"):
        load(DataSource(f"hf:{hub_folder}", name="another"))
    write_rows(hub_folder / "test.jsonl", [{"surprise": "t"}])
    with pytest.raises(DataError, match=r"cannot be loaded: .*surprise"):
        load(DataSource(f"hf:{hub_folder}"))


def test_a_data_set_that_was_saved_to_disk_is_loaded(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    assert len(load(DataSource(f"hf:{tmp_path}/one"))) == 4


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingError, match=r"pip install 'llm-quest\[datasets\]'"):
        load(DataSource("hf:org/name"))


def test_a_source_keeps_its_place_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "my.py").write_text(MODULE)
    for name in ("a.jsonl", "hf:a.jsonl", "my.py:rows"):
        assert str(tmp_path) in absolute_source(name)
    for name in ("builtin", "builtin:topics", "hf:org/name", "nowhere.jsonl", "registers:count=3"):
        assert absolute_source(name) == name


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(QuestError, match=r"nowhere\.jsonl does not exist"):
        load(DataSource(str(tmp_path / "nowhere.jsonl")))


HUB_FOLDER = {
    "data/train-00000-of-00002.jsonl": ROWS[:1], "data/train-00001-of-00002.jsonl": ROWS[1:2],
    "data/test-00000-of-00001.jsonl": ROWS[2:3], "validation/part.jsonl": ROWS[3:], "README.md": [],
    "dataset_info.json": [],
}  # fmt: skip


def write_folder(folder: Path, files: dict[str, list[dict[str, Any]]]) -> Path:
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(folder / name, rows)
    return folder


def prompts(found: Sequence[Conversation]) -> list[str]:
    return sorted(one.messages[0].content for one in found)


def test_of_a_folder_with_splits_train_is_read_and_the_others_are_told(tmp_path: Path) -> None:
    folder, report = write_folder(tmp_path / "set", HUB_FOLDER), DropReport()
    assert prompts(load(DataSource(str(folder)), report=report)) == ["q0", "q1"]
    assert {reason: count for reason, (count, _) in report.dropped.items()} == {
        "split test": 1, "split validation": 1, "suffix .md": 1, "metadata of a data set": 1,
    }  # fmt: skip
    [note] = report.remarks()
    assert "the split train is read, validation and test is not" in note
    told = note.partition("data.validation=")[2].strip("'")
    assert prompts(load(DataSource(**yaml.safe_load(told)[0]))) == ["q3"], "the remedy that is told is one"
    assert prompts(load(DataSource(str(folder), split="test"))) == ["q2"]
    with pytest.raises(UsageError, match="has no split 'dev': it has train, validation, test"):
        load(DataSource(str(folder), split="dev"))


@pytest.mark.parametrize(
    ("files", "read"),
    [(["test.jsonl", "notes.jsonl"], 2), (["a.jsonl", "latest.jsonl", "contest/b.jsonl"], 3),
     (["train.jsonl", "extra.jsonl", "eval.jsonl"], 2), (["training/a.jsonl", "dev/a.jsonl"], 1),
     (["my train.jsonl", "my-val-2.jsonl"], 1), (["retrain.jsonl", "test.jsonl"], 2)],
)  # fmt: skip
def test_a_folder_is_read_whole_where_no_file_is_named_train(tmp_path: Path, files: list[str], read: int) -> None:
    rows = [{"text": f"text {number}", "prompt": f"q{number}", "completion": "a"} for number in range(len(files))]
    folder = write_folder(tmp_path / "set", {name: [row] for name, row in zip(files, rows, strict=True)})
    assert len(load(DataSource(str(folder)))) == read
    assert len(load_corpus(folder).documents) == read, "pretraining reads the same files"


def test_a_part_that_a_source_does_not_have_is_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": "one", **ROWS[0]}])
    for source in (DataSource(str(file), split="test"), DataSource(str(tmp_path), name="en")):
        for read in (lambda one: load(one), lambda one: load_corpus([one])):
            with pytest.raises(UsageError, match=r"belongs to a data set of the hub .*; leave it out"):
                read(source)


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": table.select([0, 1]), "test": table.select([2])}).save_to_disk(str(tmp_path / "set"))
    assert prompts(load(DataSource(str(tmp_path / "set")))) == ["q0", "q1"]
    assert prompts(load(DataSource(str(tmp_path / "set"), split="test"))) == ["q2"]


ODD_VALUES = {
    "bytes": b"\xff", "a time": datetime(2020, 1, 1), "a decimal": Decimal("NaN"), "a set": {1},
    "an array": np.zeros(2), "no array": np.zeros(0), "names": np.array(["a"], object), "float32": np.float32(1),
    "int64": np.int64(3), "bool_": np.bool_(True), "str_": np.str_("x"), "arrays": [np.zeros(2)], "a tuple": ("a",),
    "digits": 10**5000, "object": object(), "numbered": {1: 2}, "a tensor": torch.zeros(1),
}  # fmt: skip
"""What a function of one's own, or `datasets` with a format, puts into a row."""


def leaf_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from leaf_paths(value[key], (*path, key))


def replace_at(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copied = value.copy()
    copied[path[0]] = replace_at(value[path[0]], path[1:], new)
    return copied


@pytest.mark.parametrize("name", ODD_VALUES)
def test_a_value_of_any_type_in_a_row_of_code_is_read_or_refused(name: str):
    """A law over every form of row, at each of its places."""
    examples = [form.example for forms in ROW_FORMS.values() for form in forms]
    rows = [replace_at(one, path, ODD_VALUES[name]) for one in examples for path in leaf_paths(one) if path]
    parsers = [read_conversations, read_preferences, read_prompt_rows, read_unpaired, read_labeled_steps]
    for parse in (*parsers, read_labeled_texts):
        for row in rows:
            with contextlib.suppress(QuestError):
                report = DropReport()
                parse(checked([(row, "rows.py:1")], report), report)  # type: ignore[operator]
                report.lines()


def test_numbers_of_numpy_are_those_of_json_and_images_stay():
    picture = np.zeros((2, 2))
    (record,) = checked(
        [({"a": np.arange(2), "b": (np.float64(1.5), np.str_("x")), "c": picture}, "rows.py:1")], DropReport()
    )
    assert record.row["a"] == [0, 1]
    assert record.row["b"] == [1.5, "x"]
    assert record.row["c"] is picture


@pytest.mark.parametrize(
    ("kind", "value"), [("timestamp[s]", 10**15), ("date32[day]", 2**30), ("duration[s]", 2**62), ("zone", 1)]
)
def test_a_date_that_python_does_not_have_is_one_message(kind: str, value: int, tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow_parquet = pytest.importorskip("pyarrow.parquet")
    made = pyarrow.timestamp("us", tz="Nowhere/City") if kind == "zone" else pyarrow.type_for_alias(kind)
    table = pyarrow.table({"text": ["a"], "when": pyarrow.array([value], type=made)})
    pyarrow_parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet is no whole Parquet file, or row 1 holds what Python cannot"):
        list(iter_records(str(tmp_path / "a.parquet"), DropReport()))
