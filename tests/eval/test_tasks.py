from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import llm_quest as quest
from llm_quest.data.problems import make_task
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.errors import UsageError
from llm_quest.eval.problems import ProblemEvalOptions, evaluate_task, load_eval_problems
from llm_quest.hub.load_save import load_model_and_tokenizer
from llm_quest.models.build import build, preset


def test_a_saved_model_is_evaluated(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(make_task("countdown").alphabet)
    model = build(replace(preset("llama3.2-tiny").config, vocab_size=tokenizer.vocab_size))
    quest.save(model, tmp_path / "model", tokenizer=tokenizer)
    options = ProblemEvalOptions("countdown:count=4,largest=9", num_problems=6, num_samples=4, max_new_tokens=5)
    loaded = load_model_and_tokenizer(tmp_path / "model", dtype="float32")
    found = evaluate_task(*loaded, load_eval_problems(options), options)
    assert found.num_problems == 6
    assert set(found.pass_at_k) == {1, 4}
    assert json.loads(json.dumps(found.as_json()))["greedy_accuracy"]["count"] == 6
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
        load_eval_problems(ProblemEvalOptions(name))


def test_a_part_that_does_not_exist_is_told() -> None:
    with pytest.raises(UsageError, match=r"no split is called .* known: train, validation, test"):
        load_eval_problems(ProblemEvalOptions("reverse", split="dev"))
