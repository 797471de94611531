from __future__ import annotations

import dataclasses
import math

import pytest

from llm_quest.data.problems import Problem
from llm_quest.errors import MissingError, UsageError
from llm_quest.rollouts.function_reward import FailureSummary
from llm_quest.rollouts.rewards import CorrectnessReward, FormatReward, RandomReward, SafeReward
from llm_quest.rollouts.sampler import Sample
from llm_quest.rollouts.verifier_process import MathVerifyReward, VerifierProcess, verify_with_math_verify
from tests.rollouts.verifier_functions import hanging, slow_to_load

PROBLEM = Problem("47+85=", "132", "number", "")


def sample(text: str, finished: str = "eos", problem: Problem = PROBLEM) -> Sample:
    tokens = tuple(map(ord, text))
    return Sample((1, 2), tokens, (-0.5,) * len(tokens), finished, text, problem)  # type: ignore[arg-type]


GROUP = [sample("132"), sample("131"), sample("x"), sample("132", "length")]


def test_correct_pays_for_the_right_answer_that_was_finished() -> None:
    assert CorrectnessReward()(GROUP) == [1.0, 0.0, 0.0, 0.0]


def test_the_controls_do_not_know_what_is_right() -> None:
    assert FormatReward()(GROUP) == [1.0, 1.0, 0.0, 0.0]
    many = [sample(str(number)) for number in range(400)]
    tossed = RandomReward(seed=3)(many)
    assert tossed == RandomReward(seed=3)(many) != RandomReward(seed=4)(many)
    assert 160 < sum(tossed) < 240


def test_a_reward_that_raises_is_unscorable_and_counted_with_its_message() -> None:
    def broken(group: object) -> list[float]:
        raise KeyError("gold")

    guarded = SafeReward(broken)  # type: ignore[arg-type]
    assert all(math.isnan(value) for value in guarded(GROUP))
    assert (guarded.num_failures, guarded.first_error) == (1, "KeyError: 'gold'")


@pytest.mark.parametrize(
    ("given", "said"), [([1.0], "1 values for a group of 4"), (["a"] * 4, "give numbers"), ([[1]] * 4, "give numbers")]
)
def test_a_reward_of_the_wrong_shape_is_its_authors_mistake(given: list[object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SafeReward(lambda group: given)(GROUP)  # type: ignore[arg-type, return-value]


def test_values_that_are_not_finite_are_unscorable_and_nothing_is_zero_in_silence() -> None:
    values = SafeReward(lambda group: [None, math.inf, math.nan, 1])(GROUP)  # type: ignore[arg-type, return-value, list-item]
    assert [math.isnan(value) for value in values] == [True, True, True, False]


def test_a_verifier_that_hangs_is_killed_and_the_next_answer_is_judged() -> None:
    with VerifierProcess(hanging, timeout_seconds=0.2) as worker:
        assert worker(PROBLEM, "132") == 1.0
        assert math.isnan(worker(PROBLEM, "hang"))
        assert math.isnan(worker(PROBLEM, "raise"))
        assert worker(PROBLEM, "131") == 0.0
        hung, raised = worker.failures
        assert hung == "hang (it took longer than 0.2 s and was stopped)"
        assert raised.endswith("ValueError: raise)")
        assert set(worker.failures.values()) == {1}


def test_what_a_verifier_imports_is_not_in_the_time_of_an_answer() -> None:
    with VerifierProcess(slow_to_load, timeout_seconds=2.0, warm_up=(PROBLEM, "1")) as worker:
        assert worker(PROBLEM, "132") == 1.0
        assert not worker.failures


def test_answers_that_math_verify_did_not_judge_are_counted() -> None:
    reward = MathVerifyReward()
    assert reward([sample(r"$\frac{264}{2}$"), sample("$131$")]) == [1.0, 0.0]
    assert isinstance(reward, FailureSummary)
    assert reward.summary() == ""
    reward.verify.failures["hang"] += 2
    assert reward.summary() == "hang: 2"
    reward.verify.close()


def test_the_reward_of_math_verify_asks_for_the_package_and_refuses_what_the_budget_cut(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match="llm-quest"):
        MathVerifyReward()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    reward = MathVerifyReward()
    reward.verify = hanging  # type: ignore[assignment]
    cut = dataclasses.replace(sample("132"), finish_reason="length")
    assert reward([sample("132"), sample("5"), cut]) == [1.0, 0.0, 0.0]


def test_math_verify_judges_latex_and_an_unreadable_gold_is_unscorable() -> None:
    half = Problem("", r"\frac{1}{2}", "fraction", "")
    assert verify_with_math_verify(half, r"so it is $\frac{2}{4}$") == 1.0
    assert verify_with_math_verify(half, r"$\frac{2}{3}$") == 0.0
    assert math.isnan(verify_with_math_verify(Problem("", "", "fraction", ""), "$1$"))
