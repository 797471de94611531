"""A reward model's food: comparisons labelled from outside, and a tenth of them from before."""

import numpy as np
import pytest

from llm_quest.data.preferences import Rated
from llm_quest.errors import DataError
from llm_quest.rollouts.sample import Sample
from llm_quest.rollouts.scored import ReplayFeed, comparisons

NAN = float("nan")


def group(*values: float) -> list[Sample]:
    return [Sample((1, 2), (10 + i, 0), (0.0, 0.0), "eos", str(i), value) for i, value in enumerate(values)]


def gold(samples: list[Sample]) -> list[float]:
    return [sample.problem for sample in samples]


def test_better_stands_beside_worse_and_groups_without_both_are_left_out():
    found = comparisons([group(0, 1, NAN), group(1, 1), group(NAN, NAN), group(0.5, 0.2, 0.9)], gold)
    assert [[one.answers[0][0], one.answers[1][0]] for one in found] == [[11, 10], [12, 11]]
    assert found[0].prompt.tolist() == [1, 2]


def rated(first: int) -> Rated:
    return Rated(np.array([first]), (np.array([5, 0]), np.array([6, 0])))


@pytest.mark.parametrize(("rows", "old"), [(10, 1), (32, 3), (4, 0), (15, 2)])
def test_a_tenth_of_every_batch_is_history(rows: int, old: int):
    feed = ReplayFeed([rated(1)] * 9, [rated(2)] * 4, rows=rows)
    for step in range(3):
        (batch,) = feed.at(step)
        assert (batch.tokens[::2, 0] == 2).sum() == old
        assert len(batch.tokens) == 2 * rows


def test_what_is_drawn_is_a_function_of_seed_and_step():
    new = [rated(i) for i in range(50)]
    one, two = (ReplayFeed(new, new, rows=8, seed=seed) for seed in (1, 2))
    assert one.at(3)[0].tokens.equal(ReplayFeed(new, new, rows=8, seed=1).at(3)[0].tokens)
    assert not one.at(3)[0].tokens.equal(one.at(4)[0].tokens)
    assert not one.at(3)[0].tokens.equal(two.at(3)[0].tokens)
    with pytest.raises(ValueError, match="other comparisons"):
        one.resume(two.bookmark())


def test_the_first_iteration_has_no_history_and_nothing_to_compare_is_an_error():
    assert len(ReplayFeed([rated(1)], [], rows=5).at(0)[0].tokens) == 10
    with pytest.raises(DataError, match="nothing to compare"):
        ReplayFeed([], [rated(1)], rows=5)
