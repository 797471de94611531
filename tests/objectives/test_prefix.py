"""Beginnings that rows share: read once, with the numbers and the gradients of rows that are read in full."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_quest.data.policy_batch import PolicyBatch, PolicyRow, micro_batches, parted, policy_batch, together
from llm_quest.data.prefix import laid
from llm_quest.models import PAGES
from llm_quest.models.build import build
from llm_quest.objectives.divergence import KL
from llm_quest.objectives.log_probs import token_log_probs
from llm_quest.objectives.policy_gradient import PolicyGradient
from llm_quest.techniques.checkpointing import Checkpointing

TINY = [one.name for page in PAGES for one in page.presets if one.name.endswith("-tiny")]
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


def learned(model: torch.nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def scored(model: torch.nn.Module, batch: PolicyBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Log-probabilities of what is learned, and the gradient of a sum in which each has its own weight."""
    found = token_log_probs(model, batch)[batch.learn]
    weights = torch.linspace(-1, 1, len(found), dtype=found.dtype)
    return found.detach(), torch.autograd.grad((found * weights).sum(), learned(model), allow_unused=True)


@pytest.mark.parametrize("name", TINY)
def test_shared_prompts_change_no_log_probability_and_no_gradient(name: str):
    model = build(name, seed=1).double().eval()
    whole_rows, shared = policy_batch(rows()), policy_batch(rows(), shared=True)
    assert shared.prefix is not None
    assert shared.prefix.tokens.shape == (3, 6)
    plain, gradients = scored(model, whole_rows)
    found, others = scored(model, shared)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(others, gradients, rtol=1e-6, atol=1e-6)


def test_the_whole_loss_is_that_of_plain_rows():
    made = PolicyGradient(build("llama3.2-tiny", seed=2).double(), kl=KL(0.1), count="tokens", temperature=0.7)
    losses = [made(policy_batch(rows(), shared=shared)) for shared in (False, True)]
    plain, shared = ((loss.total, loss.count, *(x for pair in loss.metrics.values() for x in pair)) for loss in losses)
    torch.testing.assert_close([x.detach() for x in shared], [x.detach() for x in plain], rtol=0, atol=1e-6)


def test_a_checkpointed_policy_files_nothing_twice():
    plain = scored(build("llama3.2-tiny", seed=1).double().eval(), policy_batch(rows()))
    again = Checkpointing()(build("llama3.2-tiny", seed=1).double().eval())
    torch.testing.assert_close(scored(again, policy_batch(rows(), shared=True)), plain, rtol=0, atol=1e-6)


def test_laid_out_by_hand():
    made = laid([((1, 2, 3), (7, 8)), ((4,), (9,)), ((1, 2, 3), (6,))], shared=True)
    assert made.tokens.tolist() == [[3, 7, 8], [4, 9, 0], [3, 6, 0]]
    assert made.positions.tolist() == [[2, 3, 4], [0, 1, -1], [2, 3, -1]]
    assert made.firsts == [0, 0, 0]
    assert made.prefix is not None
    assert made.prefix.tokens.tolist() == [[1, 2], [0, 0]]
    assert made.prefix.positions.tolist() == [[0, 1], [-1, -1]]
    assert (made.prefix.of.tolist(), made.prefix.reach) == ([0, 1, 0], 5)


def test_prompts_are_shared_where_that_reads_fewer_tokens_and_never_otherwise():
    long = [dataclasses.replace(row, prompt=tuple(range(1, 30))) for row in rows()]
    assert parted(long, 4096, share=True)[1]
    assert not parted(long, 4096, share=False)[1]
    apart = [dataclasses.replace(row, prompt=(*range(1, 30), number)) for number, row in enumerate(rows())]
    assert not parted(apart, 4096, share=True)[1]
    for budget in (1, 60, 200):
        groups, shared = parted(long, budget, share=True)
        assert all(together(group) <= budget or len(group) == 1 for group in groups) or not shared
        assert sorted(id(row) for group in groups for row in group) == sorted(map(id, long))


def test_micro_batches_of_shared_prompts_add_up():
    made = PolicyGradient(build("llama3.2-tiny").double(), count="sequences", kl=KL(0.1))
    long = [dataclasses.replace(row, prompt=tuple(range(1, 10 + number % 3))) for number, row in enumerate(rows())]
    found = []
    for batches in ([policy_batch(long)], micro_batches(long, 60, share=True)):
        losses = [made(batch) for batch in batches]
        total = sum(loss.total for loss in losses)
        found.append([total.detach(), *torch.autograd.grad(total, list(made.model.parameters()))])
    assert len(batches) > 1
    assert all(batch.prefix is not None for batch in batches)
    assert sum(batch.num_tokens for batch in batches) == sum(row.length for row in long)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
