"""The sequential statistics: worked examples, and 10,000 simulated experiments that stop as `quest ablate` does."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llm_quest.experiments import sequential
from tests.experiments.thresholds import running_evidence

WALKS = 10_000
FIRST = sequential.FIRST_LOOK
ERROR = 3 * math.sqrt(0.05 * 0.95 / WALKS)
"""Three standard errors of a share near 5 %."""


def walks(effect: float, cap: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((WALKS, cap)) + effect


def first_crossing(crossed: np.ndarray) -> np.ndarray:
    """The number of pairs at the first True of each row; 0 if there is none."""
    return np.where(crossed.any(1), crossed.argmax(1) + FIRST, 0)


def moments(d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n, means and standard deviations at every look."""
    n = np.arange(1, d.shape[1] + 1)
    means = d.cumsum(1) / n
    deviations = np.sqrt(((d**2).cumsum(1) - n * means**2)[:, 1:] / (n[1:] - 1))
    return n[FIRST - 1 :], means[:, FIRST - 1 :], deviations[:, FIRST - 2 :]


def run_experiments(d: np.ndarray, cap: int, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """(1 for an effect, -1 for no difference larger than delta, 0 undecided; pairs) of each walk."""
    n, means, deviations = moments(d)
    effect = running_evidence(d) >= math.log(sequential.evidence_threshold(cap))
    half = sequential.interval_factor(n, sequential.evidence_threshold(cap, 0.1)) * deviations / np.sqrt(n)
    ended = first_crossing(effect | (np.abs(means) + half < delta))
    pairs = np.where(ended, ended, cap)
    rows = np.arange(len(d)), pairs - FIRST
    return np.where(effect[rows], 1, np.where(ended > 0, -1, 0)), pairs


@pytest.mark.parametrize("cap", sequential.THRESHOLDS)
def test_without_an_effect_one_experiment_in_twenty_finds_one(cap: int):
    found = first_crossing(running_evidence(walks(0, cap)) >= math.log(sequential.evidence_threshold(cap)))
    assert abs((found > 0).mean() - 0.05) < ERROR


@pytest.mark.parametrize(("cap", "expected"), [(12, {1.0: 9, 1.5: 6, 2.0: 5}), (20, {1.0: 9, 1.5: 6, 2.0: 5})])
def test_median_pairs_until_an_effect_is_found(cap: int, expected: dict[float, int]):
    for effect, pairs in expected.items():
        evidence = running_evidence(walks(effect, cap))
        found = first_crossing(evidence >= math.log(sequential.evidence_threshold(cap)))
        assert np.median(np.where(found, found, cap + 1)) == pairs
        if cap == 20:
            assert (found > 0).mean() >= 0.9


@pytest.mark.parametrize("effect", [0.0, 0.5, 1.0, 1.5, 2.0, 4.0])
def test_the_interval_covers_under_optional_stopping(effect: float):
    """It is read where the experiment stops, with the effect, the equivalence or the cap."""
    d = walks(effect, 12, seed=1)
    _, pairs = run_experiments(d, 12, delta=1.5)
    n, means, deviations = moments(d)
    rows = np.arange(WALKS), pairs - FIRST
    half = sequential.interval_factor(n, sequential.evidence_threshold(12))[rows[1]] * deviations[rows] / np.sqrt(pairs)
    assert (np.abs(means[rows] - effect) <= half).mean() >= 0.95 - ERROR


@pytest.mark.parametrize(("cap", "delta"), [(12, 1.0), (12, 1.5), (20, 1.0), (30, 1.0)])
def test_a_difference_of_delta_is_called_none_in_one_experiment_of_twenty(cap: int, delta: float):
    outcome, _ = run_experiments(walks(delta, cap, seed=2), cap, delta)
    assert (outcome == -1).mean() <= 0.05 + ERROR


def test_a_variant_that_changes_nothing_is_decided_after_six_pairs():
    outcome, pairs = run_experiments(walks(0, 12, seed=3), 12, delta=1.5)
    assert (outcome == 1).mean() <= 0.05
    assert (outcome == -1).mean() >= 0.95
    assert np.median(pairs) == 6


def test_students_test_at_every_look_would_not_do():
    """The trap: by 12 pairs it has found an effect that is not there in 18 % of experiments."""
    n, means, deviations = moments(walks(0, 12))
    student = np.array([3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201])
    found = (np.sqrt(n) * np.abs(means) / deviations > student).any(1)
    assert found.mean() > 0.14


def test_several_arms_against_one_control_keep_the_error_rate():
    """Five arms without an effect that share their control: any verdict at all in one experiment of twenty."""
    draw = np.random.default_rng(4)
    control, arms = draw.standard_normal((2000, 1, 20)), draw.standard_normal((2000, 5, 20))
    largest = np.exp(running_evidence((arms - control).reshape(-1, 20)).max(1)).reshape(2000, 5)
    found = [sequential.holm_rejections(dict(zip("abcde", row, strict=True)), 20) for row in largest]
    assert np.mean([len(one) > 0 for one in found]) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)
    assert np.mean((largest > sequential.evidence_threshold(20)).any(1)) > 0.12, "uncorrected"


@pytest.mark.parametrize(
    ("kind", "most"), [("normal", 0.05), ("two-humped", 0.10), ("uniform", 0.06)]
)  # without the sign test 12 and 7 %
def test_accuracies_need_the_sign_test_too(kind: str, most: float):
    draw = np.random.default_rng(5)
    shape = (WALKS, 20)
    d = {
        "normal": draw.standard_normal(shape),
        "uniform": draw.uniform(-1, 1, shape),
        "two-humped": draw.choice([-1.0, 1.0], shape) + 0.3 * draw.standard_normal(shape),
    }[kind]
    signs = np.stack([sequential.sign_evidence(d[:, :n]) for n in range(FIRST, 21)], 1)
    evidence = np.exp(running_evidence(d)) >= sequential.evidence_threshold(20)
    assert (evidence & (signs >= sequential.SIGN_THRESHOLD)).any(1).mean() <= most
    assert (signs >= 20).any(1).mean() <= 0.05, "an e-process reaches 20 in at most one experiment of twenty"


def test_worked_examples():
    d = [0.1, 0.2, 0.3, 0.4]
    t = 0.25 / (np.std(d, ddof=1) / 2)
    assert sequential.t_statistic(d) == pytest.approx(t)
    expected = 5**-0.5 * ((1 + t * t / 3) / (1 + t * t / 15)) ** 2
    assert sequential.evidence(d) == pytest.approx(expected)
    assert sequential.evidence([0.0] * 9) == 1.0, "identical so far"
    assert sequential.evidence([0.5]) == 1.0
    assert sequential.evidence([0.5] * 4) == pytest.approx(5**1.5), "the most that four pairs can say"
    assert math.isfinite(sequential.evidence([1e8, 1e8 + 1, 1e8, 1e8]))
    assert [round(float(sequential.interval_factor(n, 7.01)), 2) for n in (4, 5, 6, 8, 12)] == [
        6.53, 4.20, 3.64, 3.24, 3.01,
    ]  # fmt: skip
    assert [round(sequential.stability_evidence(n, n), 1) for n in (5, 6, 7)] == [10.5, 18.1, 31.9]
    assert sequential.stability_evidence(0, 0) == 1.0
    assert sequential.divergence_bound(12) == pytest.approx(0.221, abs=1e-3)


def test_interval_and_evidence_are_each_others_inverse():
    d = [0.3, -0.1, 0.5, 0.4, 0.2, 0.35]
    low, high = sequential.sequential_interval(d, 12)
    for end in (low, high):
        assert sequential.evidence([x - end for x in d]) == pytest.approx(sequential.evidence_threshold(12))


def test_pairing_gain():
    assert sequential.pairing_gain([1, 2, 3], [1.1, 2.0, 3.2]) > 100
    assert sequential.pairing_gain([1, 2, 3], [3, 2, 1]) == pytest.approx(0.5)
    assert sequential.pairing_gain([1, 2], [1, 2]) == math.inf
