"""GSM8K from the hub's cache, as `hf download` leaves it, and from a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llm_quest.errors import DataError, MissingError, UsageError
from llm_quest.eval.problems import ProblemEvalOptions, load_eval_problems
from llm_quest.hub.gsm8k import FILES, is_gsm8k, load_gsm8k
from tests.later import Later

pyarrow, pq = Later("pyarrow"), Later("pyarrow.parquet")

ROWS = [
    {"question": f"What is {n} + {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n:,}"}
    for n in range(990, 1090)
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def write_cached_part(cache: Path, part: str, rows: list[dict[str, str]]) -> None:
    repo = cache / "datasets--openai--gsm8k"
    file = repo / "snapshots" / ("0" * 40) / FILES[part]
    file.parent.mkdir(parents=True, exist_ok=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text("0" * 40)
    pq.write_table(pyarrow.Table.from_pylist(rows), file)


def test_the_hubs_files_are_read_and_training_is_parted_by_the_questions(cache: Path) -> None:
    write_cached_part(cache, "train", ROWS[:80])
    write_cached_part(cache, "test", ROWS[80:])
    train, held, test = (load_gsm8k("gsm8k", part) for part in ("train", "validation", "test"))
    assert {one.prompt for one in train} | {one.prompt for one in held} == {row["question"] for row in ROWS[:80]}
    assert not {one.prompt for one in train} & {one.prompt for one in held}
    assert [one.answer for one in test] == [str(2 * n) for n in range(1070, 1090)]
    assert [one.prompt for one in load_eval_problems(ProblemEvalOptions("gsm8k", num_problems=3))] == [
        row["question"] for row in ROWS[80:83]
    ]
    assert {one.prompt for one in load_eval_problems(ProblemEvalOptions("gsm8k", "validation", num_problems=99))} == {
        one.prompt for one in held
    }


def test_a_file_is_parted_alike_and_as_a_test_it_is_whole(cache: Path, tmp_path: Path) -> None:
    write_cached_part(cache, "train", ROWS)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for part in ("train", "validation"):
        assert load_gsm8k(str(file), part) == load_gsm8k("gsm8k", part)
    assert len(load_gsm8k(str(file), "test")) == len(ROWS)
    file.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(DataError, match="too few problems"):
        load_gsm8k(str(file), "train")


def test_what_is_missing_is_said_with_its_remedy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingError, match=r"HF_HUB_OFFLINE is set.*hf download --repo-type dataset openai/gsm8k"):
        load_gsm8k("gsm8k", "test")
    write_cached_part(cache, "test", [{"question": "What?", "answer": "no mark"}])
    with pytest.raises(DataError, match=r"openai--gsm8k.*test.*\.parquet:1: the answer has no ####"):
        load_gsm8k("gsm8k", "test")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingError, match=r"llm-quest\[parquet\]"):
        load_gsm8k("gsm8k", "test")
    with pytest.raises(UsageError, match="no split"):
        load_eval_problems(ProblemEvalOptions("gsm8k", "dev"))


def test_names() -> None:
    assert is_gsm8k("gsm8k")
    assert is_gsm8k("folder/mine.jsonl")
    assert not is_gsm8k("countdown:count=3")
