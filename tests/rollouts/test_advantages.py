"""Advantages, worked by hand (alignment.md 1.3, 6.1) and by enumerating every outcome of a bandit."""

from itertools import product

import pytest
import torch
from torch import Tensor

from llm_quest.rollouts.advantages import (
    ADVANTAGE_ESTIMATORS,
    RewardPipeline,
    WeightedReward,
    fill_missing_rewards,
    gdpo_advantages,
    process_supervision_advantages,
    reward_spread,
    score_groups,
    total_rewards,
)

NAN = float("nan")


def rewards(*groups: list[float]) -> Tensor:
    return torch.tensor(groups, dtype=torch.float64)


def close(found: Tensor, expected: list[float] | list[list[float]], tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("std", 1.619835, -0.539945),
        ("mean", 0.75, -0.25),
        ("leave_one_out", 0.857143, -0.285714),
        ("maxrl", 3.0, -1.0),
    ],
)
def test_two_right_of_eight(name: str, right: float, wrong: float):
    group = [1.0, 0, 0, 0, 1, 0, 0, 0]
    close(ADVANTAGE_ESTIMATORS[name](rewards(group)), [[right if r else wrong for r in group]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("std", [1.305310, -0.783186, 0.261062, -0.783186]),
        ("mean", [0.625, -0.375, 0.125, -0.375]),
        ("leave_one_out", [0.833333, -0.5, 0.166667, -0.5]),
    ],
)
def test_partial_credit(name: str, expected: list[float]):
    close(ADVANTAGE_ESTIMATORS[name](rewards([1, 0, 0.5, 0])), [expected])


def test_one_deviation_for_the_batch_or_one_for_each_group():
    two = rewards([1, 0, 0, 0], [1, 1, 1, 0])
    close(
        ADVANTAGE_ESTIMATORS["batch_std"](two),
        [[1.402859, -0.467620, -0.467620, -0.467620], [0.467620, 0.467620, 0.467620, -1.402859]],
    )
    close(
        ADVANTAGE_ESTIMATORS["std"](two), [[1.4997, -0.4999, -0.4999, -0.4999], [0.4999, 0.4999, 0.4999, -1.4997]], 1e-6
    )


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
def test_groups_without_spread_get_exactly_zero(name: str):
    """Seven copies of 0.7 in float32 have a deviation of 6e-8, which a tiny eps would make an advantage of 0.9."""
    same = torch.full((1, 7), 0.7)
    near = rewards([1.0, 1.00001])
    assert ADVANTAGE_ESTIMATORS[name](same).eq(0).all()
    assert ADVANTAGE_ESTIMATORS[name](near).eq(0).all()
    assert ADVANTAGE_ESTIMATORS[name](rewards([0.0, 0.0])).eq(0).all()


def test_what_eps_alone_would_have_made_of_a_near_constant_group(monkeypatch):
    monkeypatch.setattr("llm_quest.rollouts.advantages.MIN_REWARD_SPREAD", 0.0)
    close(ADVANTAGE_ESTIMATORS["std"](rewards([1.0, 1.00001])), [[-0.0467, 0.0467]], 1e-4)


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
def test_the_unscorable_stays_out_of_the_statistics(name: str):
    found = ADVANTAGE_ESTIMATORS[name](rewards([1, NAN, 0, 0]))[0]
    without = ADVANTAGE_ESTIMATORS[name](rewards([1, 0, 0]))[0]
    assert found[1] == 0
    torch.testing.assert_close(found[[0, 2, 3]], without)


def test_one_unscorable_of_four_in_numbers():
    close(ADVANTAGE_ESTIMATORS["std"](rewards([1, NAN, 0, 0])), [[1.154501, 0, -0.577250, -0.577250]])
    assert ADVANTAGE_ESTIMATORS["std"](rewards([NAN, -1, -1, -1])).eq(0).all()
    assert ADVANTAGE_ESTIMATORS["std"](rewards([NAN, NAN, NAN, 1])).eq(0).all()
    assert reward_spread(rewards([NAN, 3, 1, 1], [NAN, NAN, NAN, 1])).tolist() == [2, 0]


def test_two_rewards_made_advantages_apart_or_together():
    accuracy, form = rewards([1, 1, 0, 0]), rewards([0.1, 0, 0.1, 0])
    close(ADVANTAGE_ESTIMATORS["std"](accuracy + form), [[0.947737, 0.775421, -0.775421, -0.947737]])
    both = torch.stack([accuracy, form])
    close(gdpo_advantages(both, [1, 1], ADVANTAGE_ESTIMATORS["std"]), [[1.224658, 0.000954, -0.000954, -1.224658]])
    close(
        gdpo_advantages(both, [1, 0], ADVANTAGE_ESTIMATORS["std"]), ADVANTAGE_ESTIMATORS["std"](accuracy).tolist(), 1e-4
    )


def test_gdpo_normalizes_the_sum_over_the_batch():
    """r - mean, two groups of two: right +-1/2 in both, form +-1/2 in the first alone. Their sums, 1 -1 1/2 -1/2, have
    mean 0 and variance (1 + 1 + 1/4 + 1/4) / 3 = 5/6; a third group, flat in both, counts as two zeros: 5/2 / 5 =
    1/2."""
    right, form = rewards([1, 0], [1, 0]), rewards([1, 0], [0, 0])
    found = gdpo_advantages(torch.stack([right, form]), [1, 1], ADVANTAGE_ESTIMATORS["mean"])
    scale = 1 / ((5 / 6) ** 0.5 + 1e-4)
    close(found, [[scale, -scale], [scale / 2, -scale / 2]])
    right, form = rewards([1, 0], [1, 0], [1, 1]), rewards([1, 0], [0, 0], [0, 0])
    scale = 1 / (0.5**0.5 + 1e-4)
    close(
        gdpo_advantages(torch.stack([right, form]), [1, 1], ADVANTAGE_ESTIMATORS["mean"]),
        [[scale, -scale], [scale / 2, -scale / 2], [0, 0]],
    )


def test_gdpo_leaves_the_unscorable_out_and_flat_groups_at_zero():
    right, form = rewards([1, 0, 0], [1, 1, 1]), rewards([1, 0, NAN], [0, 0, 0])
    found = gdpo_advantages(torch.stack([right, form]), [1, 1], ADVANTAGE_ESTIMATORS["mean"])
    assert found[0, 2] == 0
    assert found[1].tolist() == [0, 0, 0], "exactly"
    known = torch.tensor([2 / 3 + 1 / 2, -1 / 3 - 1 / 2, 0, 0, 0], dtype=torch.float64)
    close(found[0, :2], ((known - known.mean()) / (known.std() + 1e-4))[:2].tolist())


@pytest.mark.parametrize(
    ("size", "name", "share"),
    [
        (2, "mean", 0.5), (2, "leave_one_out", 1), (2, "std", 0.70701), (2, "maxrl", 1),
        (3, "mean", 0.66667), (3, "leave_one_out", 1), (3, "std", 1.15450), (3, "maxrl", 1.5),
        (4, "mean", 0.75), (4, "leave_one_out", 1), (4, "std", 1.39926), (4, "maxrl", 1.75),
    ],
)  # fmt: skip
def test_the_expected_estimate_over_all_outcomes_of_a_bandit(size: int, name: str, share: float):
    """Three arms, the first one pays: the estimate is `share` of the true gradient, in every component."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reward = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    scores = torch.eye(3, dtype=torch.float64) - p
    drawn = torch.tensor(list(product(range(3), repeat=size)))
    chance = p[drawn].prod(dim=1)
    estimates = (ADVANTAGE_ESTIMATORS[name](reward[drawn])[:, :, None] * scores[drawn]).mean(dim=1)
    expected = (chance[:, None] * estimates).sum(dim=0)
    close(expected / torch.tensor([0.25, -0.15, -0.10], dtype=torch.float64), [share] * 3, 1e-5)


def test_process_supervision_sums_this_step_and_the_later_ones():
    steps = [[(2, 0.2), (5, 0.6), (8, 1.0)], [(3, 0.4), (7, -0.2)]]
    one, two = process_supervision_advantages(steps, [10, 9])
    close(one, [1.5] * 3 + [2.0] * 3 + [1.5] * 3 + [0.0])
    close(two, [-1.5] * 8 + [0.0])
    one, two = process_supervision_advantages(steps, [10, 9], ddof=1)
    close(one, [1.341641] * 3 + [1.788854] * 3 + [1.341641] * 3 + [0.0])
    close(two, [-1.341641] * 8 + [0.0])


def test_one_step_that_ends_with_the_output_is_outcome_supervision():
    group = [1.0, 0, 0.5, 0]
    found = process_supervision_advantages([[(2, r)] for r in group], [3] * 4, ddof=1)
    outcome = ADVANTAGE_ESTIMATORS["mean"](rewards(group))[0] / rewards(group).std(correction=1)
    for tokens, advantage in zip(found, outcome, strict=True):
        close(tokens, [float(advantage)] * 3)


def test_equal_steps_hold_no_news_and_an_output_alone_may():
    assert process_supervision_advantages([[(0, 0.5), (1, 0.5)], [(0, 0.5)]], [2, 1])[0].eq(0).all()
    close(process_supervision_advantages([[(0, 1.0), (1, 0.0)]], [2])[0], [0.0, -1.0])
    assert process_supervision_advantages([[(0, NAN)], [(0, 1.0)]], [1, 1])[0].eq(0).all()


def test_a_reward_that_does_not_apply_says_nothing_about_its_sample():
    """By hand: A = [1 0 1 0], B = [2 - 0 -] with weight 1/2: B's mean is 1, so the sums are 2, 1/2, 1, 1/2, and less
    their mean 1: 1, -1/2, 0, -1/2. Counted as 0 (TRL), the second and fourth would stand at -3/4."""
    both = torch.stack([rewards([1, 0, 1, 0]), rewards([2, NAN, 0, NAN])])
    summed = torch.einsum("rpg,r->pg", fill_missing_rewards(both, [1.0, 0.5]), torch.tensor([1.0, 0.5]).double())
    close(summed, [[2, 0.5, 1, 0.5]])
    close(ADVANTAGE_ESTIMATORS["mean"](summed), [[1, -0.5, 0, -0.5]])


def test_a_reward_that_applies_to_no_sample_of_a_group_leaves_the_others_as_they_are():
    both = torch.stack([rewards([1, 0, 1, 0], [1, 0, 0, 0]), rewards([NAN] * 4, [0, 0, 1, 1])])
    assert fill_missing_rewards(both, [1.0, 1.0])[:, 0].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]


def test_a_sample_that_no_reward_with_a_weight_could_score_is_left_out():
    both = torch.stack([rewards([1, 0, 1, 0]), rewards([2, NAN, 0, 1])])
    for weights, left_out in (([1.0, 1.0], [False] * 4), ([0.0, 1.0], [False, True, False, False])):
        assert fill_missing_rewards(both, weights).isnan().any(dim=0)[0].tolist() == left_out


def test_whether_a_group_is_mixed_is_judged_by_the_first_reward_that_applies():
    pipeline = RewardPipeline(rewards=(WeightedReward("a", list), WeightedReward("b", list)))
    first, second = rewards([0, 0], [NAN, NAN], [NAN, NAN]), rewards([0, 1], [0, 1], [1, 1])
    assert pipeline.is_mixed(torch.stack([first, second])) == [False, True, False]


def test_a_reward_of_a_whole_batch_is_called_once():
    calls = []

    def count(samples):
        calls.append(len(samples))
        return range(len(samples))

    groups = [["a", "b"], ["c", "d"], ["e", "f"]]
    assert score_groups(WeightedReward("n", count, per_batch=True), groups) == [[0, 1], [2, 3], [4, 5]]
    assert score_groups(WeightedReward("n", count), groups) == [[0, 1]] * 3
    assert calls == [6, 2, 2, 2]
    several = torch.stack([rewards([1, NAN], [2, NAN]), rewards([NAN, NAN], [4, NAN])])
    torch.testing.assert_close(total_rewards(several, [2.0, 0.5]), rewards([2, NAN], [6, NAN]), equal_nan=True)
