from __future__ import annotations

import itertools
import math

import pytest

from llm_quest.errors import UsageError
from llm_quest.eval.statistics import mean_at_k, mean_pass_at_k, pass_at_k, wilson_confidence_interval


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"), [(8, 2, 1, 0.25), (8, 2, 4, 0.785714), (8, 6, 4, 1.0), (8, 0, 8, 0.0), (1, 1, 1, 1.0)]
)
def test_pass_at_k_gives_the_published_values(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(k, n, c) == pytest.approx(expected, abs=1e-6)


def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_one() -> None:
    outcomes = [1, 1, 0, 0, 0, 0, 1]
    for k in range(1, 8):
        subsets = list(itertools.combinations(outcomes, k))
        assert pass_at_k(k, 7, 3) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_more_samples_are_asked_for_where_they_are_too_few() -> None:
    with pytest.raises(UsageError, match="pass@4 needs at least 4 samples"):
        pass_at_k(4, 3, 1)


def test_the_interval_is_wilsons() -> None:
    some = wilson_confidence_interval(8, 10)
    assert (some.low, some.high) == (pytest.approx(0.490162, abs=1e-6), pytest.approx(0.943318, abs=1e-6))
    assert wilson_confidence_interval(0, 20).low == 0.0
    assert wilson_confidence_interval(0, 20).high > 0.1
    assert wilson_confidence_interval(20, 20).high == 1.0
    with pytest.raises(UsageError, match="at least one"):
        wilson_confidence_interval(0, 0)


def test_unscorable_samples_are_left_out() -> None:
    assert mean_at_k([[1.0, math.nan, 0.0], [1.0, 1.0, math.nan]]) == pytest.approx(0.75)
    assert mean_pass_at_k(2, [[1.0, 0.0, 0.0], [math.nan, 1.0, math.nan]]) == pytest.approx(2 / 3)
    assert math.isnan(mean_at_k([[math.nan]]))
