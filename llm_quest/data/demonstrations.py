"""Demonstrations of a task as a feed: what a teacher would answer, learned with its end. Row i of step s is problem
number s x rows + i: no data set, no epoch. Or a teacher has so many `examples` to show, and they come again."""

from __future__ import annotations

from typing import Any

import torch

from llm_quest.data.batch import IGNORE_INDEX, TokenBatch
from llm_quest.data.problems import Task, TaskSplit, teacher_demonstration
from llm_quest.data.tokenizer import Tokenizer


class DemonstrationLoader:
    """`rows` problems of the training split in each step; only the answer and its end are learned. num_examples: the
    first so many, again and again; None: all."""

    def __init__(
        self, task: Task, tokenizer: Tokenizer, *, batch_size: int, seed: int = 0, num_examples: int | None = None
    ):
        self.task, self.tokenizer, self.batch_size, self.seed, self.num_examples = (
            task,
            tokenizer,
            batch_size,
            seed,
            num_examples,
        )
        self.problems = TaskSplit(task)

    def batches(self, step: int) -> list[TokenBatch]:
        return [
            collate_demonstrations(
                [self.encode_example(step * self.batch_size + number) for number in range(self.batch_size)]
            )
        ]

    def encode_example(self, index: int) -> tuple[list[int], list[int]]:
        """Prompt and answer as ids, apart: a token never spans both."""
        index = index % self.num_examples if self.num_examples else index
        problem = self.problems(self.seed, index)
        answer = teacher_demonstration(self.task, problem, index, self.seed)
        tokenizer = self.tokenizer
        prompt = [tokenizer.start_token_id, *tokenizer.encode(problem.prompt, add_special_tokens=False)]
        return prompt, [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]

    def state_dict(self) -> dict[str, Any]:
        known = {"task": repr(self.task), "rows": self.batch_size, "seed": self.seed}
        return known | ({"examples": self.num_examples} if self.num_examples else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict != self.state_dict():
            raise ValueError(f"the bookmark belongs to other demonstrations: {state_dict}")


def collate_demonstrations(rows: list[tuple[list[int], list[int]]]) -> TokenBatch:
    """Padded on the right, where a causal pass never looks back: the rows are plain."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORE_INDEX)
    for number, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer) - 1
        tokens[number, :end] = torch.tensor((prompt + answer)[:-1])
        targets[number, len(prompt) - 1 : end] = torch.tensor(answer)
    return TokenBatch(tokens, targets, token_count=sum(len(prompt) + len(answer) - 1 for prompt, answer in rows))
