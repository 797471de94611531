"""Loads rows for on-policy distillation (GKD, Agarwal et al. 2024, arXiv:2306.13649, algorithm 1): with probability
lmbda the student samples a step's answers now, else they are those of the data. The loss is the same for both: the
teacher's distribution is the target at every token of the answer.

      lmbda 0: supervised distillation      lmbda 1: on-policy      between: a step is one or the other, by (seed, step)

No gradient goes through the sampling. Commonly got wrong: the student samples with dropout; the teacher reads the
answer without its prompt; an end-of-text token is appended to an answer that the budget cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from llm_quest.contracts import DataShard
from llm_quest.data.batch import IGNORE_INDEX, TokenBatch, pad_with_positions
from llm_quest.data.loader import epoch_indices
from llm_quest.data.preference_pairs import PreferenceDataset
from llm_quest.data.preferences import TokenizedPreference
from llm_quest.data.problems.problem import make_rng
from llm_quest.models.decoder import Decoder
from llm_quest.rollouts.sampler import PolicyPrompt, Sampler

PromptAnswer = tuple[Sequence[int], Sequence[int]]
StudentContext = Callable[[], AbstractContextManager[Any]]


class GKDLoader:
    """A `contracts.Loader` of questions with answers. examples: of one answer each; prompts leave room for the
    sampler's new tokens. lmbda: how often a step's answers are the student's own. student_context: inside it a sharded
    student is whole. shard: this process's part of every step's rows."""

    def __init__(
        self,
        student: Decoder,
        examples: Sequence[TokenizedPreference],
        sampler: Sampler,
        *,
        lmbda: float,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        shard: DataShard,
        student_context: StudentContext,
    ):
        self.student, self.examples, self.sampler, self.lmbda = student, examples, sampler, lmbda
        self.batch_size, self.micro_batch_size, self.seed, self.shard = batch_size, micro_batch_size, seed, shard
        self.student_context = student_context
        self.data_hash = PreferenceDataset(examples).hash

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def source(self) -> GKDLoader:
        """The loader itself: an epoch is counted in its examples."""
        return self

    def batches(self, step: int) -> list[TokenBatch]:
        rows = range(step * self.batch_size, (step + 1) * self.batch_size)
        picked = [self.examples[number] for number in epoch_indices(len(self.examples), self.seed, rows)]
        if self.is_on_policy(step):
            pairs = self.sample_answers([one.prompt for one in picked], step)
        else:
            local = self.batch_size // self.shard.world_size
            own_rows = picked[self.shard.rank * local : (self.shard.rank + 1) * local]
            pairs = [(row.prompt.tolist(), row.answers[0].tolist()) for row in own_rows]
        pairs = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
        size = self.micro_batch_size
        return [collate_answers(pairs[first : first + size]) for first in range(0, len(pairs), size)]

    def is_on_policy(self, step: int) -> bool:
        return make_rng("on-policy", self.seed, step).random() < self.lmbda

    def sample_answers(self, prompts: Sequence[np.ndarray], step: int) -> list[PromptAnswer]:
        """The student's answers to this process's part of the prompts."""
        seed = make_rng("answers", self.seed, step).getrandbits(62)
        policy_prompts = [PolicyPrompt(tuple(prompt.tolist())) for prompt in prompts]
        with self.student_context():
            groups = self.sampler(self.student, policy_prompts, 1, seed, self.shard)
        return [(sample.prompt_ids, sample.completion_ids) for group in groups for sample in group]

    def state_dict(self) -> dict[str, Any]:
        return {
            "loader": "gkd", "data": self.data_hash, "batch_size": self.batch_size, "lmbda": self.lmbda,
            "seed": self.seed,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict != self.state_dict():
            raise ValueError("the checkpoint belongs to other questions, or to another lmbda; start a new run")


def collate_answers(pairs: Sequence[PromptAnswer]) -> TokenBatch:
    """Rows of prompt and answer, with a loss at the answer's tokens."""
    tokens, positions = pad_with_positions([[*prompt, *answer[:-1]] for prompt, answer in pairs])
    targets = np.full(tokens.shape, IGNORE_INDEX)
    for number, (prompt, answer) in enumerate(pairs):
        targets[number, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = answer
    return TokenBatch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(positions))
