"""Self-refinement: what the model is shown, what ends the loop, and what is counted after every round."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import llm_quest as quest
from llm_quest.cli.main import app
from llm_quest.data.chat import CHATML_TEMPLATE
from llm_quest.data.problems import Problem
from llm_quest.errors import UsageError
from llm_quest.eval.self_refinement import RefinePrompts, SelfRefinement
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.rollouts.sampler import Sample
from tests.recipes.every_recipe import TASK, prepare

PROMPTS = RefinePrompts("right?", "again", "FINE")
PROBLEMS = [Problem(f"{n}+1=", str(n + 1), "number", str(n)) for n in range(4)]


def sample(problem: Problem, text: str) -> Sample:
    return Sample((1,), (2,), (0.0,), "eos", text, problem)


class Script:
    """Says for each problem one text after the other; keeps the conversations that it was asked with."""

    def __init__(self, texts: dict[int, list[str]]):
        self.texts, self.asked, self.heard = texts, list[list[str]](), list[list[str]]()

    def encode(self, conversations: list[list[dict[str, str]]]) -> list[list[int]]:
        self.asked = [[message["content"] for message in one] for one in conversations]
        self.heard += self.asked
        return [[0] * sum(len(text) for text in one) for one in self.asked]

    def complete(self, problems, prompts) -> list[Sample]:
        return [sample(one, self.texts[PROBLEMS.index(one)].pop(0)) for one in problems]


def refine(texts: dict[int, list[str]], drafts: list[str], rounds: int = 2, context: int = 10_000):
    script = Script(texts)
    loop = SelfRefinement(rounds, lambda p: [{"role": "user", "content": p.prompt}], script.encode, context, PROMPTS)
    answers = [sample(problem, text) for problem, text in zip(PROBLEMS, drafts, strict=False)]
    return script, loop.refine(answers, script.complete)


def test_what_changes_is_counted_and_feedback_ends_the_loop():
    texts = {0: ["all fine."], 1: ["no", "2", "FINE"], 2: ["no", "9", "no", "3"], 3: ["no", "5", "no", "4"]}
    script, (first, second) = refine(texts, ["1", "7", "3", "4"])
    assert not any(script.texts.values()), "everything was asked for"
    assert (first.accuracy.share, first.corrected, first.broken, first.stopped) == (0.5, 1, 2, 1)
    assert (second.accuracy.share, second.corrected, second.broken, second.stopped) == (1.0, 2, 0, 2)
    assert "2 corrected, 0 broken, 2 left alone by the feedback" in second.line(2)


def test_the_model_sees_all_that_was_said_before():
    script, _ = refine({0: ["f1", "a1", "f2", "a2"]}, ["a0"])
    assert script.heard == [
        ["0+1=", "a0", "right?"],
        ["0+1=", "a0", "right?", "f1", "again"],
        ["0+1=", "a0", "right?", "f1", "again", "a1", "right?"],
        ["0+1=", "a0", "right?", "f1", "again", "a1", "right?", "f2", "again"],
    ]


def test_an_answer_without_room_stays_and_is_counted():
    _, (first, second) = refine({0: ["no", "1"], 1: ["no", "2"]}, ["1", "7"], context=21)
    (only,) = refine({0: ["x" * 40]}, ["1"], rounds=1, context=21)[1]
    assert (only.no_room, only.accuracy.share) == (1, 1.0)
    assert (first.no_room, second.no_room, second.accuracy.share) == (0, 2, 1.0)


@pytest.mark.parametrize(
    ("given", "told"),
    [(["a"], "expected some of the keys feedback, refine, stop"), ({"other": "a"}, "expected some of the keys"),
     ({"stop": 3}, "each with a text"), ({"stop": " "}, "stop is empty")],
)  # fmt: skip
def test_prompts_of_another_form_are_refused(given: object, told: str):
    with pytest.raises(UsageError, match=told):
        RefinePrompts.parse(given, "p.yaml")


def test_the_command_refines_through_the_template(tmp_path: Path):
    prepare(tmp_path)
    policy = tmp_path / "policy"
    words = ["eval", str(policy), "--task", TASK, "--problems", "3", "-q", "--tokens", "3", "--refine", "2"]
    refused = CliRunner().invoke(app, words)
    assert "has no chat template" in str(refused.exception)
    tokenizer = load_tokenizer(policy)
    tokenizer.chat_template = CHATML_TEMPLATE
    tokenizer.save(policy)
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"feedback": "=", "refine": "="}))
    done = CliRunner().invoke(app, [*words, "--refine-prompts", str(tmp_path / "p.yaml")])
    assert done.exit_code == 0, done.exception
    for told in ("refine@1", "refine@2", "corrected"):
        assert told in done.stdout
    found = quest.evaluate(policy, task=TASK, num_problems=3, refine=1, max_tokens=3)
    assert len(found["refined"]) == 1
    assert "leave --no-chat out" in str(CliRunner().invoke(app, [*words, "--no-chat"]).exception)
    (tmp_path / "p.yaml").write_text("[")
    broken = CliRunner().invoke(app, [*words, "--refine-prompts", str(tmp_path / "p.yaml")])
    assert "cannot be read" in str(broken.exception)
    kwargs = CliRunner().invoke(app, [*words, "--chat-template-kwargs", "{enable_thinking: false}"])
    assert "reads no enable_thinking" in str(kwargs.exception)
