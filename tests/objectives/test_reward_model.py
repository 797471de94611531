"""Reward models: the worked vector, where the score is read, the laws, and TRL on the same tensors."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llm_quest.data.preference_pairs import collate_preferences
from llm_quest.errors import UsageError
from llm_quest.objectives.classification import last_token_outputs
from llm_quest.objectives.reward_model import RewardModelLoss, bradley_terry, score_rows
from llm_quest.techniques.score_head import ScoreHead
from tests.objectives.rated import Scoring, elements, gradients, tiny, trainer, trl_inputs


def judge(seed: int = 0):
    return ScoreHead(1, std=1.0)(tiny(seed))


@pytest.mark.parametrize(
    ("better", "worse", "margin", "loss", "slope"),
    [(1.5, 0.5, 0.0, 0.313262, -0.268941), (0.5, 1.5, 0.0, 1.313262, -0.731059), (1.5, 0.5, 1.0, 0.693147, -0.5)],
)
def test_vector_rm_1(better, worse, margin, loss, slope):
    r = torch.tensor(better, dtype=torch.float64, requires_grad=True)
    found = bradley_terry(r, torch.tensor(worse, dtype=torch.float64), torch.tensor(margin, dtype=torch.float64))
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert torch.autograd.grad(found, r)[0].item() == pytest.approx(slope, abs=1e-6)


class Scored(torch.nn.Module):
    """A model whose rows have these scores at their ends, and 99 everywhere else."""

    spec = SimpleNamespace(techniques=())

    def __init__(self, rows: list[float]):
        super().__init__()
        self.rows = rows

    def hidden_states(self, tokens, scope):
        h = torch.full((*tokens.shape, 1), 99.0, dtype=torch.float64)
        for row, score in enumerate(self.rows):
            h[row, scope.position_ids[row].argmax(), 0] = score
        return h

    def head(self, h):
        return h


def test_vector_rm_1_as_a_batch_with_centering():
    model = Scored([1.5, 0.5, 0.2, 0.7])
    batch = collate_preferences([replace(one, margin=0.0) for one in elements(2)])
    loss = RewardModelLoss(model)(batch)
    assert (loss.total / loss.count).item() == pytest.approx(0.643669, abs=1e-6)
    right, number = loss.metrics["rewards/accuracy"]
    assert (right / number).item() == 0.5
    centered = RewardModelLoss(model, center_coefficient=0.01)(batch)
    assert ((centered.total - loss.total) / loss.count).item() == pytest.approx(0.024050, abs=1e-6)
    assert (centered.total / loss.count).item() == pytest.approx(0.667719, abs=1e-6)


def test_vector_rm_1_ranked_answers_are_one_element():
    batch = collate_preferences([replace(one, margin=0.0) for one in elements(1, answers=3)])
    assert list(zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2)]
    loss = RewardModelLoss(Scored([2.0, 1.0, -0.5]))(batch)
    assert loss.count.item() == pytest.approx(1.0)
    assert loss.total.item() == pytest.approx(0.197855, abs=1e-6)


def test_only_centering_sees_what_is_added_to_every_score():
    batch = collate_preferences(elements(2))
    low, high = Scored([1.5, 0.5, 0.2, 0.7]), Scored([8.5, 7.5, 7.2, 7.7])
    assert RewardModelLoss(low)(batch).total.item() == pytest.approx(
        RewardModelLoss(high)(batch).total.item(), abs=1e-9
    )
    assert (
        RewardModelLoss(high, center_coefficient=0.01)(batch).total
        > RewardModelLoss(low, center_coefficient=0.01)(batch).total + 1
    )


def test_the_score_is_read_at_the_end_wherever_padding_stands():
    model = judge()
    tokens = torch.tensor([[5, 6, 7]])
    alone = last_token_outputs(model, tokens, torch.arange(3)[None])
    for before, after in ((0, 2), (2, 0), (1, 3)):
        padded = torch.nn.functional.pad(tokens, (before, after), value=9)
        positions = torch.nn.functional.pad(torch.arange(3)[None], (before, after), value=-1)
        torch.testing.assert_close(last_token_outputs(model, padded, positions), alone)
    changed = last_token_outputs(model, torch.tensor([[5, 6, 8]]), torch.arange(3)[None])
    assert (changed - alone).abs().item() > 1e-3


@pytest.mark.parametrize("answers", [2, 4])
def test_splitting_a_batch_adds(answers):
    model = judge()
    objective, rated = RewardModelLoss(model, center_coefficient=0.1), elements(5, answers=answers)
    whole = objective(collate_preferences(rated))
    parts = [objective(collate_preferences(rated[n : n + 1])) for n in range(5)]
    torch.testing.assert_close(whole.total, sum(part.total for part in parts))
    for got, wanted in zip(
        gradients(model, whole.total), gradients(model, sum(part.total for part in parts)), strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_equal_trl():
    from trl import RewardTrainer

    model = judge()
    batch = collate_preferences(elements(5))
    loss = RewardModelLoss(model, center_coefficient=0.01)(batch)
    inputs = {name: x for name, x in trl_inputs(batch).items() if name != "completion_mask"}
    other = trainer(model=Scoring(model), args=type("Args", (), {"center_rewards_coefficient": 0.01}))
    theirs = RewardTrainer.compute_loss(other, other.model, inputs | {"margin": batch.margins})
    torch.testing.assert_close(loss.total / loss.count, theirs, atol=1e-9, rtol=1e-9)
    for got, wanted in zip(gradients(model, loss.total / loss.count), gradients(model, theirs), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-7)


def test_scores_are_those_of_each_row_alone():
    model = judge()
    rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
    alone = [last_token_outputs(model, torch.tensor([row]), torch.arange(len(row))[None]).item() for row in rows]
    assert score_rows(model, rows, micro_batch_size=3).tolist() == pytest.approx(alone, abs=1e-5)
    with pytest.raises(UsageError, match="a reward is one number, this model's head gives 97"):
        score_rows(tiny(), rows)


def test_eight_pairs_can_be_learned_by_heart():
    model = ScoreHead(1)(tiny(dtype=torch.float32))
    batch = collate_preferences([replace(one, margin=0.0) for one in elements(8, seed=3)])
    objective, optimizer = RewardModelLoss(model), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        loss = objective(batch)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    right, all_ = objective(batch).metrics["rewards/accuracy"]
    assert right == all_
