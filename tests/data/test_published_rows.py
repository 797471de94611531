"""The published files that lie beside the project are read for what they say: GSM8K's gold answers by its authors' own
rule, preferences row by row."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llm_quest.data.document import DropReport
from llm_quest.data.preferences import read_preferences
from llm_quest.data.problems.gsm8k import GSM8K_ANSWER_MARK, read_gsm8k
from llm_quest.data.records import read_records
from llm_quest.rollouts.verifiers import is_well_formed, verify_answer

DATA = Path(__file__).parents[3] / "shared" / "data"
beside = pytest.mark.skipif(not DATA.is_dir(), reason="shared/data does not lie beside the project")
AUTHORS = re.compile(r"#### (\-?[0-9\.\,]+)")  # grade_school_math/dataset.py: then commas out


@beside
@pytest.mark.parametrize(("name", "count"), [("train", 7473), ("test", 1319)])
def test_gsm8ks_gold_answers_are_its_authors_and_its_worked_answers_are_right(name: str, count: int) -> None:
    file = DATA / f"gsm8k-{name}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    problems = read_gsm8k(file)
    assert len(problems) == len(rows) == count
    found = [AUTHORS.search(row["answer"]) for row in rows]
    assert [problem.answer for problem in problems] == [gold[1].replace(",", "") for gold in found if gold]
    for problem, row in zip(problems, rows, strict=True):
        text = "\n".join([*problem.steps, f"{GSM8K_ANSWER_MARK} {problem.answer}"])
        assert verify_answer(problem, text) == verify_answer(problem, row["answer"]) == 1.0
        assert is_well_formed(problem, text)
        assert "<<" not in text
        assert verify_answer(problem, text.replace("####", "")) == 0.0
        assert verify_answer(problem, text + "0") == 0.0


@beside
def test_preferences_are_told_from_their_answers_alone() -> None:
    file = DATA / "preferences.json"
    rows, ledger = json.loads(file.read_text(encoding="utf-8")), DropReport()
    kept = read_preferences(read_records(file), ledger)
    apart = [row for row in rows if row["chosen"].strip() != row["rejected"].strip()]
    assert (len(rows), len(kept)) == (1100, len(apart)) == (1100, 1094)
    assert [one.answers for one in kept] == [(row["chosen"], row["rejected"]) for row in apart]
    assert all(row["instruction"] in one.question[-1].content for one, row in zip(kept, apart, strict=True))
