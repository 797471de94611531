"""The bill of a rollout, by hand."""

from __future__ import annotations

import numpy as np

from llm_quest.data.policy_batch import PolicyBatch, PolicyRow, collate_policy_rows
from llm_quest.recipes.rpt.recipe import FlopsMeter, MeteredRolloutLoader
from llm_quest.rollouts.rollouts import RolloutLoader, RolloutPlan
from llm_quest.rollouts.sampler import Sample


class TokenPrice:
    """100 FLOPs a token, wherever it stands."""

    def forward(self, length: int) -> int:
        return 100 * length

    def training(self, length: int) -> int:
        return 3 * self.forward(length)

    def decoding(self, context_length: int, num_tokens: int) -> int:
        return self.forward(num_tokens - 1)


COST = TokenPrice()


def sample(prompt: int, tokens: int) -> Sample:
    return Sample((1,) * prompt, (2,) * tokens, (0.0,) * tokens, "eos", "")


def test_a_prompt_is_read_once_for_its_group_and_the_last_token_never():
    meter = FlopsMeter(COST)
    meter.count_sampling([[sample(4, 3), sample(4, 1)], [sample(2, 2), sample(2, 2)]])
    assert meter.flops == 100 * (4 + (2 + 0) + 2 + (1 + 1))
    scored = FlopsMeter(COST, num_scorings=2)
    scored.count_sampling([[sample(4, 3), sample(4, 1)]])
    assert scored.flops == 100 * (4 + 2) + 2 * 100 * (6 + 4)


def test_training_is_three_passes_over_each_row_alone():
    value = np.ones(2, np.float32)
    rows = [PolicyRow((1, 2, 3), (4, 5), value, value), PolicyRow((1,), (4, 5), value, value)]
    meter = FlopsMeter(COST)
    meter.count_training(rows)
    meter.count_training([])
    assert meter.flops == 3 * 100 * (4 + 2)


def test_samples_without_an_advantage_are_not_billed_for_training():
    """Of three samples one has the advantage 0."""

    class Fed:
        """Rollouts whose rows are given."""

        plan = RolloutPlan()
        rollout = None

        def batches(self, step: int) -> list[PolicyBatch]:
            return [collate_policy_rows(self.rows_to_read(self.minibatch(step)))]

        def minibatch(self, inner: int) -> list[PolicyRow]:
            one, none = np.ones(2, np.float32), np.zeros(2, np.float32)
            return [PolicyRow((1, 2, 3), (4, 5), worth, none) for worth in (one, none, -one)]

        rows_to_read = RolloutLoader.rows_to_read
        read_all = False

    meter = FlopsMeter(COST)
    MeteredRolloutLoader(Fed(), meter).batches(0)
    assert meter.flops == 3 * 100 * (4 + 4)
