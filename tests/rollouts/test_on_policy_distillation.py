"""Rows for GKD: whose answers they are, that processes and micro-batches change nothing, and TRL's loss on them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from llm_quest.contracts import DataShard
from llm_quest.data.batch import TokenBatch
from llm_quest.data.preferences import TokenizedPreference
from llm_quest.models.build import build
from llm_quest.objectives.distillation import DistillationLoss
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.rollouts.on_policy_distillation import GKDLoader, collate_answers
from llm_quest.rollouts.sampler import Sampler
from llm_quest.scope import Scope
from tests.objectives.rated import tiny
from tests.rollouts.test_rollouts import Words

EXAMPLES = [TokenizedPreference(np.arange(1 + n, 4 + 2 * n), (np.array([60 + n, 61, 9]),)) for n in range(6)]


def loader(student: Any, lmbda: float, micro: int = 4, shard: DataShard = DataShard()) -> GKDLoader:
    sampler = Sampler(tokenizer=Words(), eos_token_ids=(7, 9), max_new_tokens=5)
    return GKDLoader(
        student, EXAMPLES, sampler, lmbda=lmbda, batch_size=4, micro_batch_size=micro, seed=1, shard=shard,
        student_context=nullcontext,
    )  # fmt: skip


def texts(batches: list[TokenBatch]) -> list[tuple[int, ...]]:
    """Each row's learned tokens."""
    return sorted(tuple(targets[targets != -100].tolist()) for batch in batches for targets in batch.targets)


def test_a_row_is_a_prompt_and_an_answer_that_is_learned():
    batch = collate_answers([((1, 2, 3), (4, 9)), ((5,), (6, 7, 9))])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert batch.targets.tolist() == [[-100, -100, 4, 9], [6, 7, 9, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, -1]]


def test_lmbda_says_whose_answers_they_are():
    student = build("llama3.2-tiny", seed=1)
    given = {tuple(one.answers[0].tolist()) for one in EXAMPLES}
    for step in range(4):
        assert set(texts(loader(student, 0.0).batches(step))) <= given
        assert not set(texts(loader(student, 1.0).batches(step))) & given
    kinds = [loader(student, 0.5).is_on_policy(step) for step in range(200)]
    assert 70 < sum(kinds) < 130
    for shard in (DataShard(0, 2), DataShard(1, 2)):  # a step is of one kind on every process
        assert kinds == [loader(student, 0.5, shard=shard).is_on_policy(step) for step in range(200)]


def test_answers_are_of_the_student_as_it_is_now_and_a_pure_function_of_seed_and_step():
    student = build("llama3.2-tiny", seed=1).train()
    before = texts(loader(student, 1.0).batches(3))
    assert texts(loader(student, 1.0).batches(3)) == before != texts(loader(student, 1.0).batches(4))
    assert student.training
    with torch.no_grad():
        student.head.weight.mul_(-1)
    assert texts(loader(student, 1.0).batches(3)) != before


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_neither_micro_batches_nor_processes_change_the_rows_of_a_step(lmbda: float):
    student = build("llama3.2-tiny", seed=1)
    whole = texts(loader(student, lmbda).batches(0))
    assert texts(loader(student, lmbda, micro=1).batches(0)) == whole
    halves = [loader(student, lmbda, micro=2, shard=DataShard(rank, 2)).batches(0) for rank in (0, 1)]
    assert sorted([*texts(halves[0]), *texts(halves[1])]) == whole


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_loss_on_the_students_own_answers_equals_trls(beta: float):
    from trl.experimental.gkd import GKDTrainer

    student, teacher = tiny(1), tiny(2).eval()
    batch = loader(student, 1.0).batches(0)[0]
    found = NextTokenLoss(student, auxiliary=[DistillationLoss(teacher, beta=beta)])(batch)
    scope = Scope(batch.position_ids)
    theirs = GKDTrainer.generalized_jsd_loss(
        student(batch.input_ids, scope), teacher(batch.input_ids, scope), labels=batch.targets, beta=beta
    )
    torch.testing.assert_close(found.total / found.count, theirs, atol=1e-9, rtol=1e-9)
    for one, other in zip(
        torch.autograd.grad(found.total / found.count, list(student.parameters())),
        torch.autograd.grad(theirs, list(student.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)
