"""Runs that fail while they look healthy are told of, once, with a remedy that their recipe takes; healthy ones are
left in peace."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_quest.recipes.diagnostics import SUPERVISED_SYMPTOMS
from llm_quest.recipes.dpo import PROBABILITY_SYMPTOMS
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.train.divergence import STREAK
from tests.recipes import every_recipe
from tests.recipes.every_recipe import prepare, run_tiny

ALL = (*SUPERVISED_SYMPTOMS, *PROBABILITY_SYMPTOMS)


def rows_of(losses: list[float], **columns: list[Any]) -> Iterator[dict[str, Any]]:
    for number, loss in enumerate(losses):
        more = {
            name.replace("__", "/"): values[number] for name, values in columns.items() if values[number] is not None
        }
        yield {"step": 10 * (number + 1), "loss": loss, "learning_rate": 1e-3, "skipped_steps": 0} | more


FALLING = [5.0 * 0.8**n + 1 for n in range(12)]
NONE = [None] * 3
ILL: dict[str, list[dict[str, Any]]] = {
    "overfitting": list(
        rows_of(FALLING, eval__loss=[*NONE, 3.0, *NONE[:1], 3.1, *NONE[:1], 3.3, *NONE[:1], 3.6, None, None])
    ),
    "pairs at chance": list(rows_of([0.69] * 6, eval__accuracy=[0.52] * 6, eval__interval=[0.05] * 6)),
    "classes at chance": list(rows_of([0.69] * 6, eval__accuracy=[0.6] * 6, eval__commonest=[0.6] * 6)),
    "skipped steps": list(rows_of(FALLING, skipped_steps=[0] * 9 + [3, 5, 6])),
    "margin collapses": list(
        rows_of(
            [0.6] * 12,
            logps__chosen=[-30.0 - 0.8 * n for n in range(12)],
            logps__rejected=[-30.0 - n for n in range(12)],
            rewards__margin=[0.5, 1, 1.5, 2, 2, 1.5, 1, 0.8, 0.6, 0.5, 0.4, 0.3],
        )
    ),
    "chosen answers fall": list(
        rows_of(
            [0.6 - 0.05 * n for n in range(12)],
            logps__chosen=[-30.0 - 2 * n for n in range(12)],
            logps__rejected=[-30.0 - 9 * n for n in range(12)],
            rewards__margin=[0.3 * n for n in range(12)],
        )
    ),
}
HEALTHY = {
    "falls": list(rows_of(FALLING)),
    "noise at the end": list(rows_of([*FALLING, 1.3, 1.6, 1.2, 1.5])),
    "held-out loss rises once": list(rows_of(FALLING, eval__loss=[3 - n / 9 + n % 2 / 5 for n in range(12)])),
    "pairs are told apart": list(rows_of([0.5] * 6, eval__accuracy=[0.6] * 6, eval__interval=[0.05] * 6)),
    "classes are told apart": list(rows_of([0.5] * 6, eval__accuracy=[0.7] * 6, eval__commonest=[0.6] * 6)),
    "one skipped step": list(rows_of(FALLING, skipped_steps=[1] * 12)),
    "preferences are learned": list(
        rows_of(
            [0.6 - 0.03 * n for n in range(12)],
            logps__chosen=[-30.0 - 0.1 * n for n in range(12)],
            logps__rejected=[-30.0 - n for n in range(12)],
            rewards__margin=[0.2 * n for n in range(12)],
        )
    ),
}  # fmt: skip


def advice(rows: list[dict[str, Any]]) -> list[str]:
    doctor = Diagnostics(symptoms=ALL)
    return [text for row in rows for text in doctor.on_log(row)]


def test_every_recipe_is_watched():
    folder = Path(inspect.getfile(every_recipe)).parents[2] / "llm_quest" / "recipes"
    texts = {str(file): file.read_text(encoding="utf-8") for file in folder.rglob("*.py")}
    jobs = {name: text for name, text in texts.items() if " Job(\n" in text}
    assert len(jobs) >= 9
    assert [name for name, text in jobs.items() if "watchers=[Diagnostics(" not in text] == []


def test_every_symptom_has_an_example():
    assert [one.name for one in ALL] == list(ILL)


@pytest.mark.parametrize("name", ILL)
def test_a_failing_run_is_told_once_on_one_line(name: str):
    (text,) = advice(ILL[name])
    (symptom,) = [one for one in ALL if one.name == name]
    assert "\n" not in text
    assert text in [symptom.advice(row) for row in ILL[name]]


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_left_in_peace(name: str):
    assert advice(HEALTHY[name]) == []


def test_a_rate_that_is_far_too_high_is_told_in_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLM_QUEST_CACHE", str(tmp_path / "cache"))
    prepare(tmp_path)
    run_tiny(
        "sft", tmp_path, tmp_path / "run", "learning_rate=1.0", "max_steps=12", "save_steps=0", "max_grad_norm=null"
    )
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["event"] == "diverging"]
    assert told["step"] == 1 + STREAK
    assert "Lower learning_rate" in told["message"]
    assert "set max_grad_norm" in told["message"]
