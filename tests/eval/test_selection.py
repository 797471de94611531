"""Majority votes and best-of-k: the estimates are the means over all subsets, counted one by one."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llm_quest.cli.eval_options import EVAL_MEASURES, check_eval_options
from llm_quest.cli.main import app
from llm_quest.data.problems import Problem
from llm_quest.errors import UsageError
from llm_quest.eval.policy import PolicyEvaluator
from llm_quest.eval.problems import Selection, sample_answer
from llm_quest.eval.selection import best_of_at_k, majority_at_k, selection_sizes
from llm_quest.hub.load_save import load, save
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.rollouts.sampler import Sample
from llm_quest.rollouts.verifiers import VERIFIERS, verify_answer
from llm_quest.techniques.score_head import ScoreHead
from tests.recipes.every_recipe import TASK, prepare


def vote_by_hand(votes: tuple[tuple[str | None, float], ...]) -> float:
    """Whether the majority is right; a shared first place counts in parts."""
    counts = Counter(answer for answer, _ in votes if answer is not None)
    first = [answer for answer, count in counts.items() if count == max(counts.values())]
    right = {answer for answer, worth in votes if worth}
    return sum(answer in right for answer in first) / len(first) if first else 0.0


@pytest.mark.parametrize("seed", range(6))
def test_a_majority_is_the_mean_over_all_subsets(seed: int):
    chance = random.Random(seed)
    answers = [chance.choice(["a", "a", "b", "c", "d", None]) for _ in range(8)]
    votes = [(answer, float(answer == "a")) for answer in answers]
    for k in range(1, 9):
        every = [vote_by_hand(subset) for subset in itertools.combinations(votes, k)]
        assert majority_at_k(k, votes) == pytest.approx(sum(every) / len(every), abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_best_of_k_is_the_mean_over_all_subsets(seed: int):
    chance = random.Random(seed)
    scored = [(chance.choice([0.0, 1.0, 2.0, chance.random()]), float(chance.random() < 0.5)) for _ in range(8)]
    for k in range(1, 9):
        every = []
        for subset in itertools.combinations(scored, k):
            best = [worth for reward, worth in subset if reward == max(value for value, _ in subset)]
            every.append(sum(best) / len(best))
        assert best_of_at_k(k, scored) == pytest.approx(sum(every) / len(every), abs=1e-12)


def test_by_hand():
    votes = [("7", 1.0), ("7", 1.0), ("3", 0.0)]
    assert (majority_at_k(1, votes), majority_at_k(3, votes)) == (pytest.approx(2 / 3), pytest.approx(1.0))
    assert majority_at_k(2, votes) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert majority_at_k(2, [(None, 0.0), (None, 0.0)]) == 0.0
    assert best_of_at_k(2, [(0.1, 0.0), (0.2, 1.0), (0.3, 0.0)]) == pytest.approx(1 / 3)
    with pytest.raises(UsageError, match="a choice among 4 needs"):
        majority_at_k(4, votes)
    assert (selection_sizes(0), selection_sizes(16), selection_sizes(20)) == ([], [1, 4, 16], [1, 4, 16, 20])


TEXTS = (
    "7", " 7 ", "7.0", "07", "14/2", "3/7", "", "abc", "4+3", "3+4", "4*3-5", "(4+3)", "3*4=12;#7", "#7", "1#7", "x#8",
    "#### 7", "so #### 7", "so #### 8", "<think>a</think><answer>7</answer>", "<think>b</think><answer>14/2</answer>",
    "<think>b</think><answer>8</answer>", "$7.", "1,000", "1000",
)  # fmt: skip


def sample_of(verifier: str, text: str, finish: str = "eos") -> Sample:
    problem = Problem("p", "7", verifier, "k", numbers=(4, 3) if verifier == "expression" else ())
    return Sample((1,), (2,), (0.0,), finish, text, problem)  # type: ignore[arg-type]


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_equal_answers_are_right_together_and_every_right_answer_has_a_vote(verifier: str):
    verdicts: dict[object, set[float]] = {}
    for text in TEXTS:
        sample = sample_of(verifier, text)
        verdicts.setdefault(sample_answer(sample), set()).add(verify_answer(sample.problem, text))
    assert verdicts.pop(None, {0.0}) == {0.0}, "an answer that is right has no vote"
    assert all(len(found) == 1 for found in verdicts.values()), verdicts
    assert {1.0} in verdicts.values(), "no example is right"
    assert sample_answer(sample_of(verifier, "7", "length")) is None


def test_samples_that_cannot_be_scored_are_left_out():
    drawn = [[sample_of("number", "7"), sample_of("number", "7"), sample_of("number", "3")]]
    selection = Selection(vote=2, best_of=2, reward=lambda group: [0.1, 0.2, 0.3])
    assert selection.majorities(drawn, [[1.0, math.nan, 0.0]]) == {1: 0.5, 2: 0.5}
    assert selection.best_of_rewards(drawn, [[1.0, math.nan, 0.0]]) == {1: 0.5, 2: 0.0}


@pytest.mark.parametrize(
    ("weights", "best"), [((0.0, 1.0), 0.0), ((0.0, -1.0), 1.0), ((1.0, 0.0), None), ((5.0, 1.0), 1.0)]
)
def test_a_policys_evaluation_votes_and_takes_the_best_rewarded_sample(
    weights: tuple[float, float], best: float | None
):
    """The reward `length` likes a wrong answer of both problems best; the second sample of the second has none."""
    drawn = [[sample_of("number", answer) for answer in group] for group in ("773", "733")]
    liked = torch.tensor([[0.1, 0.2, 0.3], [0.3, math.nan, 0.4]]).double()
    correct = torch.tensor([[float(s.text == "7") for s in group] for group in drawn]).double()

    def draw(model: Any, problems: Any, sampling: Any, n: int, seed: int) -> list[list[Sample]]:
        return [group[:n] for group in drawn]

    def score(groups: list[list[Sample]]) -> torch.Tensor:
        return torch.stack([correct, liked])[:, :, : len(groups[0])]

    names = list(zip(("correct", "length"), weights, strict=True))
    problems = [group[0].problem for group in drawn]
    found = PolicyEvaluator(problems, draw, score, names, 0, num_samples=3).evaluate(None, 0)  # type: ignore[arg-type]
    assert found["maj@3"] == 0.5
    assert found["mean@3"] == 0.5
    assert found.get("best@3") == best


GIVEN = {
    "--tokens": 9, "--problems": 3, "--part": "test", "--temperature": 1.0, "--samples": 4, "--vote": 4, "--best-of": 4,
    "--reward-model": "runs/r", "--chat": False, "--refine": 2, "--refine-prompts": "p.yaml", "--system": "s",
    "--chat-template-kwargs": "{}", "--fewshot": 2, "--fewshot-as-multiturn": True,
}  # fmt: skip
MEASURES = ("--data", "--task", "--harness")


@pytest.mark.parametrize("measure", EVAL_MEASURES)
@pytest.mark.parametrize("option", GIVEN)
def test_an_option_without_effect_is_refused_by_name(measure: str, option: str):
    chosen = dict.fromkeys(MEASURES, "") | ({measure: "x"} if measure else {})
    others = {"--vote": 4} if option == "--temperature" else {}
    others |= (
        {"--reward-model": "r"} if option == "--best-of" else {"--best-of": 4} if option == "--reward-model" else {}
    )
    others |= {"--refine": 1} if option == "--refine-prompts" else {}
    others |= {"--chat": True} if option == "--fewshot-as-multiturn" else {}
    options = dict.fromkeys(GIVEN) | {option: GIVEN[option]} | others
    if option in EVAL_MEASURES[measure]:
        check_eval_options(chosen, options)
    else:
        with pytest.raises(UsageError, match=r"has no effect (with|on what a run held out)"):
            check_eval_options(chosen, options)


@pytest.mark.parametrize("option", ["--temperature", "--best-of", "--reward-model", "--refine-prompts"])
def test_an_option_that_needs_another_says_which(option: str):
    with pytest.raises(UsageError, match=f"{option} has no effect without --"):
        check_eval_options({"--task": "x"}, {option: GIVEN[option]})
    with pytest.raises(UsageError, match="--fewshot-as-multiturn has no effect without --chat"):
        check_eval_options({"--harness": "x"}, {"--fewshot-as-multiturn": True})


def test_two_measures_at_once_are_refused():
    with pytest.raises(UsageError, match="--data and --task measure different things"):
        check_eval_options({"--data": "a", "--task": "b"}, {})


def test_the_command_votes_and_chooses(tmp_path: Path):
    prepare(tmp_path)
    policy = str(tmp_path / "policy")
    judge = load(policy, dtype="float32")
    save(ScoreHead(1, seed=0)(judge), tmp_path / "judge", tokenizer=load_tokenizer(policy))
    words = ["eval", policy, "--task", TASK, "--problems", "3", "-q", "--tokens", "4"]
    done = CliRunner().invoke(app, [*words, "--vote", "4", "--best-of", "4", "--reward-model", str(tmp_path / "judge")])
    assert done.exit_code == 0, done.exception
    for told in ("maj@1", "maj@4", "best-of-4", "pass@4"):
        assert told in done.stdout
    other = CliRunner().invoke(app, [*words, "--best-of", "2", "--reward-model", policy])
    assert isinstance(other.exception, UsageError)
    assert "is not a reward model" in str(other.exception)
    chat = CliRunner().invoke(app, [*words, "--chat"])
    assert "has no chat template" in str(chat.exception)
