"""Beginnings that rows share: read once, with the numbers and the gradients of rows that are read in full."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_quest.data.batch import pad_with_shared_prefix
from llm_quest.data.policy_batch import (
    PolicyBatch,
    PolicyRow,
    collate_policy_rows,
    full_token_cost,
    group_by_token_budget,
    micro_batches,
    plan_micro_batches,
    shared_token_cost,
)
from llm_quest.data.preference_pairs import collate_preferences
from llm_quest.data.preferences import TokenizedPreference
from llm_quest.models import FAMILIES
from llm_quest.models.build import build
from llm_quest.objectives.kl_penalty import KLPenalty
from llm_quest.objectives.log_probs import token_log_probs
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.objectives.preference import DPO, PreferenceLoss
from llm_quest.techniques.activation_checkpointing import ActivationCheckpointing

TINY = [one.name for page in FAMILIES for one in page.presets if one.name.endswith("-tiny")]
PROMPTS = [(3, 1, 4, 1, 5, 9, 2), (6, 5, 3), (8,)]


def rows(vocab: int = 90) -> list[PolicyRow]:
    """Ragged prompts (one of a single token), ragged completions, three of each, in a mixed order."""
    g = np.random.default_rng(0)
    found = []
    for number in range(9):
        tokens = tuple(int(token) for token in g.integers(1, vocab, 1 + (5 * number) % 7))
        numbers = [g.uniform(-1.5, 0.5, len(tokens)).astype(np.float32) for _ in range(3)]
        found.append(PolicyRow(PROMPTS[number % 3], tokens, numbers[0], numbers[1] - 4, None, numbers[2] - 4))
    return found


def trainable_parameters(model: torch.nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def log_probs_and_gradients(model: torch.nn.Module, batch: PolicyBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Log-probabilities of what is learned, and the gradient of a sum in which each has its own weight."""
    found = token_log_probs(model, batch)[batch.loss_mask]
    weights = torch.linspace(-1, 1, len(found), dtype=found.dtype)
    return found.detach(), torch.autograd.grad((found * weights).sum(), trainable_parameters(model), allow_unused=True)


@pytest.mark.parametrize("name", TINY)
def test_shared_prompts_change_no_log_probability_and_no_gradient(name: str):
    model = build(name, seed=1).double().eval()
    whole_rows, shared = collate_policy_rows(rows()), collate_policy_rows(rows(), share_prompts=True)
    assert shared.prefix is not None
    assert shared.prefix.input_ids.shape == (3, 6)
    plain, gradients = log_probs_and_gradients(model, whole_rows)
    found, others = log_probs_and_gradients(model, shared)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(others, gradients, rtol=1e-6, atol=1e-6)


def test_the_whole_loss_is_that_of_plain_rows():
    made = PolicyGradientLoss(
        build("llama3.2-tiny", seed=2).double(), kl=KLPenalty(0.1), count="tokens", temperature=0.7
    )
    losses = [made(collate_policy_rows(rows(), share_prompts=shared)) for shared in (False, True)]
    plain, shared = ((loss.total, loss.count, *(x for pair in loss.metrics.values() for x in pair)) for loss in losses)
    torch.testing.assert_close([x.detach() for x in shared], [x.detach() for x in plain], rtol=0, atol=1e-6)


def test_a_checkpointed_policy_files_nothing_twice():
    plain = log_probs_and_gradients(build("llama3.2-tiny", seed=1).double().eval(), collate_policy_rows(rows()))
    again = ActivationCheckpointing()(build("llama3.2-tiny", seed=1).double().eval())
    torch.testing.assert_close(
        log_probs_and_gradients(again, collate_policy_rows(rows(), share_prompts=True)), plain, rtol=0, atol=1e-6
    )


def test_laid_out_by_hand():
    made = pad_with_shared_prefix([((1, 2, 3), (7, 8)), ((4,), (9,)), ((1, 2, 3), (6,))], shared=True)
    assert made.tokens.tolist() == [[3, 7, 8], [4, 9, 0], [3, 6, 0]]
    assert made.positions.tolist() == [[2, 3, 4], [0, 1, -1], [2, 3, -1]]
    assert made.first_target_columns == [0, 0, 0]
    assert made.prefix is not None
    assert made.prefix.input_ids.tolist() == [[1, 2], [0, 0]]
    assert made.prefix.position_ids.tolist() == [[0, 1], [-1, -1]]
    assert (made.prefix.prefix_index.tolist(), made.prefix.reach) == ([0, 1, 0], 5)


def test_prompts_are_shared_where_that_reads_fewer_tokens_and_never_otherwise():
    long = [dataclasses.replace(row, prompt_ids=tuple(range(1, 30))) for row in rows()]
    assert plan_micro_batches(long, 4096, share_prompts=True)[1]
    assert not plan_micro_batches(long, 4096, share_prompts=False)[1]
    apart = [dataclasses.replace(row, prompt_ids=(*range(1, 30), number)) for number, row in enumerate(rows())]
    assert not plan_micro_batches(apart, 4096, share_prompts=True)[1]
    for budget in (1, 60, 200):
        groups, shared = plan_micro_batches(long, budget, share_prompts=True)
        assert all(shared_token_cost(group) <= budget or len(group) == 1 for group in groups) or not shared
        assert sorted(id(row) for group in groups for row in group) == sorted(map(id, long))


@pytest.mark.parametrize("share_prompts", [False, True])
def test_a_group_takes_rows_as_long_as_its_whole_cost_allows(share_prompts: bool):
    cost = shared_token_cost if share_prompts else full_token_cost
    two = [*rows(), *(dataclasses.replace(row, prompt_ids=(*row.prompt_ids, 7)) for row in rows())]
    for budget in range(1, 400, 7):
        groups = group_by_token_budget(two, budget, share_prompts=share_prompts)
        assert all(cost(group) <= budget or len(group) == 1 for group in groups)
        for group, behind in itertools.pairwise(groups):
            assert cost([*group, behind[0]]) > budget
    assert len(groups) == 1


def test_micro_batches_of_shared_prompts_add_up():
    made = PolicyGradientLoss(build("llama3.2-tiny").double(), count="sequences", kl=KLPenalty(0.1))
    long = [dataclasses.replace(row, prompt_ids=tuple(range(1, 10 + number % 3))) for number, row in enumerate(rows())]
    found = []
    for batches in ([collate_policy_rows(long)], micro_batches(long, 60, share_prompts=True)):
        losses = [made(batch) for batch in batches]
        total = sum(loss.total for loss in losses)
        found.append([total.detach(), *torch.autograd.grad(total, list(made.model.parameters()))])
    assert len(batches) > 1
    assert all(batch.prefix is not None for batch in batches)
    assert sum(batch.num_tokens for batch in batches) == sum(row.length for row in long)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


RATED = [
    TokenizedPreference(np.arange(1, 10), (np.array([5, 2, 7]), np.array([4, 4]))),
    TokenizedPreference(np.array([8]), (np.array([6, 6, 6, 6, 1, 2]), np.array([3]), np.array([9, 9]))),
    TokenizedPreference(np.arange(1, 10), (np.array([11]), np.array([12, 13, 14]))),
]


@pytest.mark.parametrize("name", TINY)
def test_answers_that_share_their_question_have_the_same_loss_and_gradient(name: str):
    made = PreferenceLoss(build(name, seed=1).double(), DPO(0.3))
    known = [np.linspace(-9, -5, len(one.answers)) for one in RATED]
    batches = [collate_preferences(RATED, known, share_prompts=shared) for shared in (False, True)]
    losses = [made(batch) for batch in batches]
    gradients = [
        torch.autograd.grad(loss.total, trainable_parameters(made.model), allow_unused=True) for loss in losses
    ]
    torch.testing.assert_close(losses[1].total, losses[0].total, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)
    assert batches[1].num_tokens == batches[0].num_tokens == int((batches[0].position_ids >= 0).sum())


def test_a_question_is_laid_once_for_all_of_its_answers_where_that_is_less_to_read():
    shared = collate_preferences(RATED, share_prompts=True)
    assert shared.prefix is not None
    assert shared.prefix.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [0] * 8]
    assert shared.prefix.prefix_index.tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert shared.input_ids[:4].tolist() == [
        [9, 5, 2, 0, 0, 0],
        [9, 4, 0, 0, 0, 0],
        [8, 6, 6, 6, 6, 1],
        [8, 0, 0, 0, 0, 0],
    ]
    assert shared.targets[1].tolist() == [4, 4, -100, -100, -100, -100]
    again = shared.full_rows
    whole = [row[places >= 0].tolist() for row, places in zip(again.input_ids, again.position_ids, strict=True)]
    assert whole[0] == [*range(1, 10), 5, 2]
    assert again.targets[0].tolist() == [-100] * 8 + [5, 2, 7, -100, -100, -100]
    one = [TokenizedPreference(np.array([1, 2]), (np.arange(1, 9), np.arange(2, 10)))]
    assert collate_preferences(one, share_prompts=True).prefix is not None
    short, long = (np.array([1]), np.array([2])), (np.arange(1, 9), np.arange(2, 10))
    apart = [TokenizedPreference(np.array([1, 2]), long), TokenizedPreference(np.array([1, 3, 4, 4, 4]), short)]
    assert collate_preferences(apart, share_prompts=True).prefix is None
