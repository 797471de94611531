"""`Comparison`: pair by pair the decisions of the simulated rule, and the outcomes that are no difference."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llm_quest.errors import UsageError
from llm_quest.experiments.code_tree import PACKAGE, differing_files, open_edit, own_code
from llm_quest.experiments.comparison import Claim, Comparison
from llm_quest.experiments.verdict_lines import describe_evidence, describe_verdict
from tests.experiments.edits import DRAWS, KINDS, edits, write_patch
from tests.experiments.null_edits import simulate
from tests.experiments.test_sequential import run_experiments, walks

LOSS = Claim("eval/loss", 1.5, 12, greater_is_better=False, normal=True)


def compare(differences: list[float | None], claim: Claim = LOSS) -> Comparison:
    """One arm, whose control measures 0."""
    comparison = Comparison(claim, ["arm"])
    for seed, value in enumerate(differences, 1):
        if not comparison.open_arms:
            break
        comparison.add_pair(seed, 0.0, {"arm": value})
    return comparison


@pytest.mark.parametrize("effect", [0.0, 1.0, -1.5])
def test_it_stops_where_the_simulated_rule_stops(effect: float):
    d = walks(effect, 12, seed=7)[:60]
    outcomes, pairs = run_experiments(d, 12, delta=1.5)
    for row, outcome, ended in zip(d, outcomes, pairs, strict=True):
        arm = compare(list(row)).arms["arm"]
        assert arm.started == ended
        effects = {True: "worse", False: "better"}
        expected = {1: effects[arm.differences and np.mean(arm.differences) > 0], 0: "undecided (cap)"}
        assert arm.outcome == expected.get(outcome, "no difference larger than delta")


def test_for_an_accuracy_more_is_better():
    accuracy = Claim("eval/accuracy", 0.03, 12, greater_is_better=True, normal=False)
    assert compare([0.1 + 0.01 * (i % 3) for i in range(12)], accuracy).arms["arm"].outcome == "better"


NOT_WORSE = replace(LOSS, margin="not worse")
EQUIVALENT = replace(LOSS, margin="no difference")
HALFWAY = [0.7, 0.8, 0.9, 0.8]


@pytest.mark.parametrize(
    ("claim", "d", "outcome", "size"),
    [
        (NOT_WORSE, [-2.0, -2.1, -1.9, -2.0], "not worse by delta", "better than the control"),
        (NOT_WORSE, [0.1, -0.1, 0.2, -0.2], "not worse by delta", ""),
        (NOT_WORSE, HALFWAY, "not worse by delta", "worse than the control by less"),
        (NOT_WORSE, [2.0, 2.1, 1.9, 2.0], "worse by more than delta", ""),
        (NOT_WORSE, [1.4, 1.5, 1.6, 1.5] * 3, "undecided (cap)", ""),
        (EQUIVALENT, HALFWAY, "no difference larger than delta", "worse than the control by less"),
        (EQUIVALENT, [2.0, 2.1, 1.9, 2.0], "worse by more than delta", ""),
        (EQUIVALENT, [-2.0, -2.1, -1.9, -2.0], "better by more than delta", ""),
        (EQUIVALENT, [-1.4, -1.5, -1.6, -1.5] * 3, "undecided (cap)", ""),
        (LOSS, HALFWAY, "worse", "by less than delta"),
    ],
)
def test_claims_of_a_margin_are_compared_with_delta(claim: Claim, d: list[float], outcome: str, size: str):
    """An effect between 0 and delta would end a comparison with 0 as worse or as no difference, by chance."""
    found = compare(d, claim).verdict("arm")
    assert (found["outcome"], found["size"]) == (outcome, size)


def test_a_margin_of_accuracies_needs_the_signs_too():
    """Four pairs of one sign reach 8 at most."""
    accuracy = Claim("eval/accuracy", 0.03, 12, greater_is_better=True, normal=False, margin="not worse")
    found = compare([0.1, 0.11, 0.12] * 4, accuracy).verdict("arm")
    assert (found["outcome"], found["pairs"]) == ("not worse by delta", 5)
    assert compare([-0.1, -0.11, -0.12] * 4, accuracy).arms["arm"].outcome == "worse by more than delta"


@pytest.mark.parametrize(("effect", "outcome"), [(1.5, "not worse by delta"), (1.5, "worse by more than delta")])
def test_an_effect_of_delta_is_called_either_in_one_experiment_of_twenty(effect: float, outcome: str):
    found = [compare(list(row), NOT_WORSE).arms["arm"].outcome for row in walks(effect, 12, seed=8)[:400]]
    assert found.count(outcome) / 400 <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


def test_an_effect_below_delta_is_not_refuted():
    """Half of delta (0.75 sigma). A comparison with 0 says worse in a third of experiments and none in half of them."""
    rows = walks(0.75, 12, seed=9)[:300]
    margins, effects = ([compare(list(row), claim).arms["arm"].outcome for row in rows] for claim in (NOT_WORSE, LOSS))
    assert margins.count("worse by more than delta") <= 3
    assert margins.count("not worse by delta") > 150
    assert effects.count("worse") > 90


def test_a_number_without_a_logarithm_is_refused_where_logarithms_are_compared():
    ratios = replace(LOSS, scale="log")
    assert ratios.rescale(2.0) - ratios.rescale(1.0) == pytest.approx(np.log(2.0))
    with pytest.raises(UsageError, match=r"eval/loss is 0, and only numbers above 0 have a logarithm \(scale: log\)"):
        ratios.rescale(0.0)


def test_identical_runs_are_no_difference():
    found = compare([0.0] * 12).verdict("arm")
    assert (found["outcome"], found["pairs"]) == ("no difference larger than delta", 4)
    assert "identical" in found["reason"]
    assert found["evidence"] == [1.0] * 4


def test_an_arm_that_diverges_is_worse_and_its_pairs_are_not_dropped():
    found = compare([None] * 12).verdict("arm")
    assert (found["outcome"], found["pairs"]) == ("worse", 7)
    assert "7 of 7" in found["reason"]
    assert found["mean"] is None
    mixed = compare([-5.0, None, -5.1, -4.9, -5.0]).verdict("arm")
    assert (mixed["outcome"], mixed["pairs"], mixed["diverged"]) == ("better", 5, [2])
    assert any("of the pairs that finished" in line for line in describe_verdict(mixed))


def test_arms_that_are_decided_leave_and_the_others_go_on():
    comparison = Comparison(LOSS, ["good", "null"])
    draw = np.random.default_rng(0)
    while comparison.open_arms and comparison.pairs < 12:
        values = {name: {"good": -9.0, "null": 0.0}[name] + 2 * draw.normal() for name in comparison.open_arms}
        comparison.add_pair(comparison.pairs + 1, 0.0, values)
    assert comparison.arms["good"].outcome == "better"
    assert comparison.arms["good"].started < comparison.arms["null"].started
    assert comparison.arms["null"].outcome != "open"


def test_pairing_that_does_not_help_is_said():
    comparison = Comparison(LOSS, ["arm"])
    draw = np.random.default_rng(1)
    for seed in range(1, 7):
        comparison.add_pair(seed, draw.normal(), {"arm": draw.normal()})
        if not comparison.open_arms:
            break
    assert any("pairing did not help" in line for line in describe_verdict(comparison.verdict("arm")))


def test_the_words_of_a_verdict():
    first, second, *_ = describe_verdict(compare([-2.0, -2.1, -1.9, -2.05]).verdict("arm"))
    assert first == "arm: better, by at least 1.5"
    assert "4 pairs" in second
    assert "95 %" in second
    assert "undecided" in describe_verdict(compare([8.0, -8.0] * 6).verdict("arm"))[0]


def test_evidence_that_had_passed_its_threshold_earlier_is_shown():
    """Accuracies: the evidence of four pairs is enough, the signs are not before the fifth (gspo's pairs)."""
    claim = Claim("eval/mean@8", 0.05, 12, greater_is_better=True, normal=False)
    found = compare([0.01875, 0.0253125, 0.0159375, 0.0171875, 0.0484375], claim).verdict("arm")
    assert found["outcome"] == "better"
    assert found["evidence"][-1] < found["threshold"]
    assert describe_evidence(found) == "6.86 of 7.05, which it had passed with 8.67 after 4 pairs"
    assert describe_evidence(compare([-2.0, -2.1, -1.9, -2.05]).verdict("arm")).endswith("of 7.05")


def test_a_verdict_names_the_interval_that_decided_it():
    """Four pairs whose 90 % interval lies within delta, and whose 95 % interval does not."""
    found = compare([0.6, -0.6, 0.6, -0.6]).verdict("arm")
    assert found["outcome"] == "no difference larger than delta"
    assert found["interval_95"][1] > LOSS.delta > found["interval_90"][1]
    assert found["decided_by"] == "interval_90"
    low, high = found["interval_90"]
    assert f"decided by the 90 % interval, {low:+.4g} to {high:+.4g}" in describe_verdict(found)[1]
    better = compare([-2.0, -2.1, -1.9, -2.05]).verdict("arm")
    assert better["decided_by"] == "evidence"
    assert not any("decided by" in line for line in describe_verdict(better))
    assert compare([None] * 12).verdict("arm")["decided_by"] == "diverged"
    assert compare([8.0, -8.0] * 6).verdict("arm")["decided_by"] == ""


def test_of_two_hundred_null_edits_few_are_called_better_or_worse():
    """A quick part of `python -m tests.experiments.null_edits`."""
    outcomes = simulate(200)
    assert outcomes["better"] + outcomes["worse"] <= 16, "17 of 200 occur in one campaign of forty"
    assert outcomes["no difference larger than delta"] >= 180


@pytest.mark.parametrize("kind", KINDS)
def test_null_edits_apply_to_the_package_and_only_those_that_can_change_a_run_are_run(kind: str, tmp_path: Path):
    for number, edit in enumerate(itertools.islice(edits(kind, PACKAGE, 0), 2)):
        patch = write_patch(edit, PACKAGE, tmp_path / f"{number}.patch")
        found = differing_files(own_code(), open_edit(str(patch), tmp_path / f"code{number}"))
        assert found == (sorted(edit.files) if kind in ("order", "draws") else []), edit.name


@pytest.mark.parametrize("name", DRAWS)
def test_what_an_edit_of_the_draws_replaces_stands_once(name: str):
    for file, old, _ in DRAWS[name]:
        assert (PACKAGE / file).read_text(encoding="utf-8").count(old) == 1
