"""A reward model's food: comparisons labeled from outside, and a tenth of them from before."""

import numpy as np
import pytest

from llm_quest.data.preferences import TokenizedPreference
from llm_quest.errors import DataError
from llm_quest.rollouts.model_reward import ReplayLoader, make_comparisons
from llm_quest.rollouts.sampler import Sample

NAN = float("nan")


def group(*values: float) -> list[Sample]:
    return [Sample((1, 2), (10 + i, 0), (0.0, 0.0), "eos", str(i), value) for i, value in enumerate(values)]


def gold(samples: list[Sample]) -> list[float]:
    return [sample.problem for sample in samples]


def test_better_stands_beside_worse_and_groups_without_both_are_left_out():
    found = make_comparisons([group(0, 1, NAN), group(1, 1), group(NAN, NAN), group(0.5, 0.2, 0.9)], gold)
    assert [[one.answers[0][0], one.answers[1][0]] for one in found] == [[11, 10], [12, 11]]
    assert found[0].prompt.tolist() == [1, 2]


def preference_of(first: int) -> TokenizedPreference:
    return TokenizedPreference(np.array([first]), (np.array([5, 0]), np.array([6, 0])))


@pytest.mark.parametrize(("rows", "old"), [(10, 1), (32, 3), (4, 0), (15, 2)])
def test_a_tenth_of_every_batch_is_history(rows: int, old: int):
    feed = ReplayLoader([preference_of(1)] * 9, [preference_of(2)] * 4, batch_size=rows)
    for step in range(3):
        (batch,) = feed.batches(step)
        assert (batch.input_ids[::2, 0] == 2).sum() == old
        assert len(batch.input_ids) == 2 * rows


def test_what_is_drawn_is_a_function_of_seed_and_step():
    new = [preference_of(i) for i in range(50)]
    one, two = (ReplayLoader(new, new, batch_size=8, seed=seed) for seed in (1, 2))
    assert one.batches(3)[0].input_ids.equal(ReplayLoader(new, new, batch_size=8, seed=1).batches(3)[0].input_ids)
    assert not one.batches(3)[0].input_ids.equal(one.batches(4)[0].input_ids)
    assert not one.batches(3)[0].input_ids.equal(two.batches(3)[0].input_ids)
    with pytest.raises(ValueError, match="other comparisons"):
        one.load_state_dict(two.state_dict())


def test_the_first_iteration_has_no_history_and_nothing_to_compare_is_an_error():
    assert len(ReplayLoader([preference_of(1)], [], batch_size=5).batches(0)[0].input_ids) == 10
    with pytest.raises(DataError, match="nothing to compare"):
        ReplayLoader([], [preference_of(1)], batch_size=5)
