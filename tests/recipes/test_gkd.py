"""On-policy distillation as a run, tiny: it comes nearer to its teacher on its own answers, and resumes to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llm_quest.cli.train import estimate_cost
from llm_quest.errors import UsageError
from tests.recipes.tuned import WORDS, base, metrics, start_run, weights, write_rows

TEXT = """
recipe: gkd
batch_size: 8
sequence_length: 40
max_new_tokens: 6
max_steps: 30
eval_steps: 30
"""
SFT = """
recipe: sft
batch_size: 4
sequence_length: 48
max_steps: 40
eval_steps: 0
samples: {every_steps: 0}
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A teacher that has learned to say the word that was asked for; questions of the same kind, wrongly answered."""
    folder = tmp_path_factory.mktemp("gkd")
    start = base(folder / "model")
    asked = [(f"say {word} {other}", word) for word in WORDS for other in WORDS]
    right = write_rows(folder / "right.jsonl", [{"prompt": p, "completion": w} for p, w in asked])
    wrong = write_rows(folder / "wrong.jsonl", [{"prompt": p, "completion": "user"} for p, w in asked])
    start_run("sft", SFT, folder / "teacher", f"model.load={start}", f"data.source={right}")
    return [f"model.load={start}", f"teacher.load={folder / 'teacher'}", f"data.source={wrong}"]


def test_on_its_own_answers_the_model_comes_to_write_as_its_teacher(options: list[str], tmp_path: Path):
    """The data's answers are wrong, and are not read with lmbda 1."""
    out, said = tmp_path / "run", list[str]()
    outcome = start_run("gkd", TEXT, out, *options, "lmbda=1", "teacher.beta=0.5", "max_steps=60", log=said.append)
    rows = metrics(out)
    assert rows[-1]["distillation"] < 0.2 * rows[0]["distillation"]
    assert rows[0]["loss"] == pytest.approx(rows[0]["distillation"])
    assert outcome.scores["on_policy"] < 0.5 * rows[0]["distillation"]
    assert any(line.startswith("teacher: ") for line in said)


def test_a_resumed_run_has_the_bits_of_one_that_was_never_interrupted(options: list[str], tmp_path: Path):
    more = [*options, "lmbda=0.5", "max_steps=8", "save_steps=4", "save_total_limit=9", "eval_steps=0"]
    start_run("gkd", TEXT, tmp_path / "whole", *more)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000008")
    start_run("gkd", TEXT, tmp_path / "again", *more)
    assert weights(tmp_path / "again", 8) == weights(tmp_path / "whole", 8)


def test_the_teacher_and_the_answers_are_planned(options: list[str]):
    numbers = ["sequence_length=40", "max_new_tokens=6", "batch_size=8", "max_steps=20", "precision=fp32"]
    found = estimate_cost("gkd", [*options, *numbers], measure=True, log=lambda line: None)
    assert found.measured
    assert found.memory["teacher"] > 0


def test_a_budget_without_room_for_a_question_is_refused(options: list[str], tmp_path: Path):
    with pytest.raises(UsageError, match="leaves no tokens for a question"):
        start_run("gkd", TEXT, tmp_path / "run", *options, "max_new_tokens=40")
