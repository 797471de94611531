"""The reinforcement learning experiments: every kind of arm for two steps of a tiny model; verdicts on made-up
numbers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_quest.data.problems.chained import Chained
from llm_quest.data.problems.strings import Reverse
from llm_quest.papers import (
    countdown,
    lab,
    label_noise,
    load_paper,
    memorizes,
    noisy_teacher,
    overoptimization,
    process,
    reproduce,
    reverse,
    rl_lab,
    variants,
)
from llm_quest.papers.paper import ExperimentResults, Measurement
from llm_quest.papers.reproduce import code_fingerprint
from llm_quest.papers.rl_lab import (
    RejectionSamplingLoader,
    RLExperiment,
    base_policy,
    margin_verdict,
    rl_arm,
    standard_arms,
)

TINY = RLExperiment(
    name="tiny", task=Reverse(shortest=1, longest=2, letters=3), width=16, layers=1, sft_steps=4,
    sft_learning_rate=1e-2, prompts=4, group=4, new_tokens=4, steps=2, every=1, eval_problems=4, final_problems=6,
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base policies are cached in a folder of this test."""
    monkeypatch.setattr(lab, "default_cache_dir", lambda: tmp_path / "cache")


def test_every_arm_begins_at_the_same_weights_and_measures_the_same_bits_again() -> None:
    made = standard_arms(TINY, 1e-2)
    found = {name: arm(1) for name, arm in made.items()}
    starts = {measured.curve[0] for measured in found.values() if measured.curve}
    assert len(starts) == 1
    assert all([x for x, _ in one.curve] == [0, 1, 2] for name, one in found.items() if name != "base policy")
    assert all(0 <= value <= 1 for one in found.values() for value in one.numbers.values())
    assert made["GRPO"](1) == found["GRPO"]


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo", "gspo", "sapo", "cispo"])
def test_four_minibatches_are_four_steps_for_each_rollout(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(rl_lab, "train", lambda o, feed, opt, rate, settings, **rest: asked.append(settings.steps))
    rl_arm(TINY, rate=1e-2, variant=variant, minibatches=4)(1)
    assert asked == [4, 4 * TINY.steps]  # the base policy's first


def test_steps_of_an_answer_are_rewarded() -> None:
    chained = replace(TINY, task=Chained(shortest=1, longest=1, modulus=3), new_tokens=8)
    assert rl_arm(chained, rate=1e-2, process=True)(1).curve[-1][0] == 2


def test_rejection_fine_tuning_learns_from_correct_samples_alone() -> None:
    """`reverse(a)=` is `a`: the letter is token 9, its answer is the target at 11, the end of text the next."""
    taught = replace(TINY, task=Reverse(shortest=1, longest=1, letters=3), sft_steps=30)
    feed = RejectionSamplingLoader(taught, 1)
    (batch,) = feed.batches(0)
    assert 0 < len(batch.input_ids) < taught.rows
    assert (batch.targets[:, 11] == batch.input_ids[:, 9]).all()
    assert (batch.targets[:, 12] == taught.tokenizer.eos_token_id).all()
    assert all(
        (a == b).all() for a, b in zip(feed.policy.parameters(), base_policy(taught, 1).parameters(), strict=True)
    )


def test_flipped_pairs_are_the_same_pairs_with_the_other_label() -> None:
    clean, flipped = label_noise.make_pairs("train", 40, 0.0, 1), label_noise.make_pairs("train", 40, 0.3, 1)
    turned = 0
    for a, b in zip(clean.preferences, flipped.preferences, strict=True):
        assert {tuple(x) for x in a.answers} == {tuple(x) for x in b.answers}
        turned += tuple(a.answers[0]) != tuple(b.answers[0])
    assert 4 <= turned <= 20
    words = {tuple(e.prompt) for e in clean.preferences}
    assert not words & {tuple(e.prompt) for e in label_noise.make_pairs("test", 40, 0.0, 0).preferences}


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "robust"])
def test_preferences_are_learned_for_two_steps(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = replace(TINY, task=Reverse(shortest=3, longest=3, letters=4))
    monkeypatch.setattr(label_noise, "EXPERIMENT", words)
    for name, value in {"PAIRS": 16, "ROWS": 8, "STEPS": 2, "EVERY": 1, "HELD_OUT": 4}.items():
        monkeypatch.setattr(label_noise, name, value)
    found = label_noise.make_arm(loss, 0.3)(1)
    assert 0 <= found.numbers["accuracy"] <= 1
    assert found.curve[-1][0] == 2


def test_an_iterative_reward_model_gets_as_many_questions_as_a_fixed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overoptimization, "EXPERIMENT", replace(TINY, sft_steps=40))
    for name, value in {"PHASES": 2, "STEPS": 1, "QUESTIONS": 3, "REWARD_MODEL_STEPS": 2}.items():
        monkeypatch.setattr(overoptimization, name, value)
    asked: list[int] = []
    real = overoptimization.update_reward_model
    groups = overoptimization.sample_groups

    def counted(model, seed: int, phase: int, number: int = 3):
        asked.append(number)
        return groups(model, seed, phase, number)

    monkeypatch.setattr(overoptimization, "sample_groups", counted)
    monkeypatch.setattr(overoptimization, "update_reward_model", lambda *given: real(*given))
    fixed = overoptimization.make_arm()(1)
    assert asked == [6, 3, 3]  # to learn from at once; to look at the proxy, before and after
    asked.clear()
    trained = overoptimization.make_arm(iterative=True)(1)
    assert asked == [3, 3, 3, 3]
    assert "proxy gained" in fixed.numbers
    assert "proxy gained" in trained.numbers
    assert "proxy gained" not in overoptimization.make_arm(gold_reward=True)(1).numbers


def made_up(numbers: Mapping[str, tuple[float, ...]], name: str) -> ExperimentResults:
    """One number of each arm for three seeds."""
    found = ExperimentResults()
    for arm, values in numbers.items():
        for seed, value in enumerate(values, 1):
            found.add(arm, seed, Measurement({name: value}))
    return found


def far(grpo: float, teacher: float = 0.5, coin: float = 0.1) -> ExperimentResults:
    means = {"base policy": 0.5, "GRPO": grpo, "more SFT": teacher, "random reward": coin}
    means |= {"rejection fine-tuning": 0.9, "format-only reward": 0.3}
    return made_up({arm: (m, m + 0.01, m - 0.01) for arm, m in means.items()}, "greedy")


@pytest.mark.parametrize(
    ("results", "outcome"),
    [
        (far(0.8), "confirmed"), (far(0.6), "no effect seen"), (far(0.3), "refuted"),
        (far(0.8, coin=0.8), "no effect seen"),
    ],
)  # fmt: skip
def test_confirmed_is_ahead_by_so_many_points_and_of_rewards_without_information(
    results: ExperimentResults, outcome: str
) -> None:
    assert margin_verdict(results, "greedy", 0.15).outcome == outcome
    assert noisy_teacher.verdict(results).outcome == outcome


@pytest.mark.parametrize(
    ("one", "eight", "outcome"),
    [(0.5, 0.6, "confirmed"), (0.5, 0.9, "refuted"), (0.3, 0.6, "no effect seen"), (0.5, 0.8, "no effect seen")],
)
def test_countdown_confirms_what_is_likelier_in_one_sample_and_rarer_in_eight(
    one: float, eight: float, outcome: str
) -> None:
    found = ExperimentResults()
    for seed, noise in enumerate((0.0, 0.01, -0.01), 1):
        for arm in countdown.ARMS:
            first = {"greedy": 0.5, "mean@8": 0.3, "pass@8": 0.8}
            found.add(
                arm,
                seed,
                Measurement(first | {"mean@8": one + noise, "pass@8": eight - noise} if arm == "GRPO" else first),
            )
    assert countdown.verdict(found).outcome == outcome


@pytest.mark.parametrize(
    ("grpo", "teacher", "outcome"),
    [(0.5, 0.2, "confirmed"), (0.5, 0.4, "no effect seen"), (0.2, 0.0, "no effect seen"), (0.3, 0.4, "refuted")],
)
def test_memorizes_confirms_rewards_that_improve_where_demonstrations_are_few(
    grpo: float, teacher: float, outcome: str
) -> None:
    means = {"base policy": 0.3, "GRPO": grpo, "more SFT": teacher, "rejection fine-tuning": 0.4}
    means |= {"random reward": 0.0}
    found = ExperimentResults()
    for seed, noise in enumerate((0.0, 0.01, -0.01), 1):
        for arm, mean in means.items():
            found.add(arm, seed, Measurement({"mean@8": mean + noise * (arm == "GRPO"), "greedy": 0.1}))
    assert memorizes.verdict(found).outcome == outcome


def test_a_limited_number_of_demonstrations_is_repeated() -> None:
    few = replace(TINY, num_demonstrations=6)
    feed, later, endless = (
        few.demonstration_loader(3, 4),
        few.demonstration_loader(3, 4, more=True),
        TINY.demonstration_loader(3, 4),
    )

    def example(loader: Any, number: int) -> tuple[list[int], list[int]]:
        return loader.source.encode_example(number, loader.seed)

    assert [example(feed, 6 + number) for number in range(6)] == [example(later, number) for number in range(6)]
    assert example(endless, 6) != example(endless, 0)
    assert example(endless, 0) != example(TINY.demonstration_loader(3, 4, more=True), 0)
    assert feed.state_dict() != endless.state_dict()


@pytest.mark.parametrize(
    ("grpo", "coin", "outcome"),
    [(0.9, 0.0, "refuted"), (0.9, 0.7, "confirmed"), (0.6, 0.0, "no effect seen")],
)
def test_random_rewards_that_improve_confirm_and_others_refute(grpo: float, coin: float, outcome: str) -> None:
    means = {"base policy": 0.5, "GRPO": grpo, "random reward": coin}
    assert reverse.verdict(made_up({arm: (m, m, m) for arm, m in means.items()}, "greedy")).outcome == outcome


def test_the_other_verdicts_read_paired_differences() -> None:
    ups = {"base policy": (0.1, 0.2, 0.3), "outcome": (0.2, 0.5, 0.8), "process": (0.3, 0.6, 0.9)}
    assert process.verdict(made_up(ups, "mean@8")).outcome == "confirmed"
    same = dict.fromkeys(variants.NAMES, (0.5, 0.6, 0.7))
    assert variants.verdict(made_up(same | {"GSPO": (0.4, 0.5, 0.6)}, "greedy")).outcome == "refuted"
    assert variants.verdict(made_up(same, "greedy")).outcome == "no effect seen"
    noisy = dict.fromkeys(label_noise.ARMS, (0.7, 0.6, 0.8))
    robust = noisy | {"robust, 30%": (0.8, 0.7, 0.9)}
    assert label_noise.verdict(made_up(robust, "accuracy")).outcome == "confirmed"
    assert label_noise.verdict(made_up(noisy, "accuracy")).outcome == "no effect seen"


GREEDY = {"greedy at the end": 0.3, "best greedy": 0.4}


@pytest.mark.parametrize(
    ("proxy", "gold", "outcome"), [(1, 0.5, "confirmed"), (-1, 0.5, "no effect seen"), (1, 0, "refuted")]
)
def test_overoptimization_is_a_proxy_that_rises_and_gold_that_the_iterative_model_keeps(
    proxy: float, gold: float, outcome: str
) -> None:
    found = ExperimentResults()
    for seed in (1, 2, 3):
        found.add("fixed", seed, Measurement(GREEDY | {"samples right at the end": 0.2, "proxy gained": proxy}))
        found.add("iterative", seed, Measurement(GREEDY | {"samples right at the end": gold, "proxy gained": 1}))
    assert overoptimization.verdict(found).outcome == outcome
    assert (
        "greedy answers goes from a best of 0.4 ± 0 to 0.3 ± 0, of samples to 0.2 ± 0"
        in overoptimization.verdict(found).explanation
    )


def test_a_change_of_the_shared_code_measures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other, real = (
        code_fingerprint(load_paper("reverse")),
        code_fingerprint(load_paper("qk_clip")),
        inspect.getsource,
    )
    monkeypatch.setattr(reproduce.inspect, "getsource", lambda m: real(m) + "x = 1\n" * (m is rl_lab))
    assert code_fingerprint(load_paper("reverse")) != own
    assert code_fingerprint(load_paper("variants")) != own
    assert code_fingerprint(load_paper("qk_clip")) == other
