"""Demonstrations of a task as a feed: what a teacher would answer, learned with its end. Row i of step s is problem
number s x rows + i: no data set, no epoch. Or a teacher has so many `examples` to show, and they come again."""

from __future__ import annotations

from typing import Any

import torch

from llm_quest.data.batch import IGNORE, TokenBatch
from llm_quest.data.problems import Drawn, Task, demonstration
from llm_quest.data.tokenizer import Tokenizer


class DemonstrationFeed:
    """`rows` problems of the training split in each step; only the answer and its end are learned. examples: the first
    so many, again and again; None: all."""

    def __init__(self, task: Task, tokenizer: Tokenizer, *, rows: int, seed: int = 0, examples: int | None = None):
        self.task, self.tokenizer, self.rows, self.seed, self.examples = task, tokenizer, rows, seed, examples
        self.problems = Drawn(task)

    def at(self, step: int) -> list[TokenBatch]:
        return [demonstrations([self.row(step * self.rows + number) for number in range(self.rows)])]

    def row(self, index: int) -> tuple[list[int], list[int]]:
        """Prompt and answer as ids, apart: a token never spans both."""
        index = index % self.examples if self.examples else index
        problem = self.problems(self.seed, index)
        answer = demonstration(self.task, problem, index, self.seed)
        tokenizer = self.tokenizer
        prompt = [tokenizer.start_id, *tokenizer.encode(problem.prompt, template=False)]
        return prompt, [*tokenizer.encode(answer, template=False), tokenizer.end_id]

    def bookmark(self) -> dict[str, Any]:
        known = {"task": repr(self.task), "rows": self.rows, "seed": self.seed}
        return known | ({"examples": self.examples} if self.examples else {})

    def resume(self, bookmark: dict[str, Any]) -> None:
        if bookmark != self.bookmark():
            raise ValueError(f"the bookmark belongs to other demonstrations: {bookmark}")


def demonstrations(rows: list[tuple[list[int], list[int]]]) -> TokenBatch:
    """Padded on the right, where a causal pass never looks back: the rows are plain."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORE)
    for number, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer) - 1
        tokens[number, :end] = torch.tensor((prompt + answer)[:-1])
        targets[number, len(prompt) - 1 : end] = torch.tensor(answer)
    return TokenBatch(tokens, targets, counted=sum(len(prompt) + len(answer) - 1 for prompt, answer in rows))
