from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import llm_quest as quest
from llm_quest.cli.problems import Exam, chosen, examine
from llm_quest.data.alphabet import character_tokenizer
from llm_quest.data.problems import task
from llm_quest.errors import UsageError
from llm_quest.models.build import build, preset


def test_a_saved_model_is_examined(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(task("countdown").alphabet)
    model = build(replace(preset("llama3.2-tiny").config, vocab=tokenizer.vocab_size))
    quest.save(model, tmp_path / "model", tokenizer=tokenizer)
    exam = Exam("countdown:count=4,largest=9", number=6, samples=4, tokens=5)
    found = examine(str(tmp_path / "model"), exam, device="cpu", dtype="float32", say=lambda text: None)
    assert found.problems == 6
    assert set(found.passes) == {1, 4}
    assert json.loads(json.dumps(found.as_json()))["greedy"]["count"] == 6
    assert "6 problems" in found.lines()[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("countdwn", "did you mean 'countdown'"),
        ("countdown:size=4", "no option size"),
        ("countdown:count", "write name=value"),
        ("countdown:count=x", "options are numbers"),
    ],
)
def test_what_is_no_task_is_told(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        chosen(Exam(name))


def test_a_part_that_does_not_exist_is_told() -> None:
    with pytest.raises(UsageError, match="known: train, validation, test"):
        chosen(Exam("reverse", part="dev"))
