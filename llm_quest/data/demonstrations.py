"""Demonstrations of a task: problems with the teacher's answers, learned with their ends. Row i is problem i: there is
no data set and no epoch, unless the teacher has a limited number of examples, which then come again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llm_quest.data.batch import IGNORE_INDEX, TokenBatch, pad
from llm_quest.data.loader import split_rows
from llm_quest.data.problems import Task, TaskSplit, teacher_demonstration
from llm_quest.data.tokenizer import Tokenizer


class Demonstrations:
    """A `RowSource` of problems of the training split with their answers; only the answer and its end are learned.
    num_examples: the first so many, again and again; None: every row is a new problem."""

    def __init__(self, task: Task, tokenizer: Tokenizer, *, num_examples: int | None = None):
        self.task, self.tokenizer, self.num_examples = task, tokenizer, num_examples
        self.problems = TaskSplit(task)

    def micro_batches(self, rows: range, micro_batch_size: int, seed: int) -> list[TokenBatch]:
        return [
            collate_demonstrations([self.encode_example(number, seed) for number in part])
            for part in split_rows(rows, micro_batch_size)
        ]

    def encode_example(self, index: int, seed: int) -> tuple[list[int], list[int]]:
        """Prompt and answer as ids: a token never spans both."""
        index = index % self.num_examples if self.num_examples else index
        problem = self.problems(seed, index)
        answer = teacher_demonstration(self.task, problem, index, seed)
        tokenizer = self.tokenizer
        prompt, completion = tokenizer.encode_pieces(problem.prompt, answer)
        return [tokenizer.start_token_id, *prompt], [*completion, tokenizer.eos_token_id]

    def fingerprint(self) -> dict[str, Any]:
        return {"loader": "demonstrations", "data": repr(self.task), "num_examples": self.num_examples}


def collate_demonstrations(rows: Sequence[tuple[list[int], list[int]]]) -> TokenBatch:
    """Padded on the right, where no token of a causal pass sees it: the rows are plain."""
    tokens = pad([[*prompt, *answer][:-1] for prompt, answer in rows], 0)
    targets = pad([[*[IGNORE_INDEX] * (len(prompt) - 1), *answer] for prompt, answer in rows], IGNORE_INDEX)
    count = sum(len(prompt) + len(answer) - 1 for prompt, answer in rows)
    return TokenBatch(torch.from_numpy(tokens), torch.from_numpy(targets), token_count=count)
