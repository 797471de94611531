"""Whole documents, each in a row of its own, padded on the right, where no token of a causal pass sees the padding:
texts, every one once an epoch and in another order each epoch, or a task's problems with the teacher's answers."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llm_quest.data.batch import IGNORE_INDEX, TokenBatch, pad, split_rows
from llm_quest.data.loader import epoch_indices, shuffled_batches
from llm_quest.data.problems import Task, TaskSplit, teacher_demonstration
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError

TokenIds = Sequence[int]
MAX_CACHED_TEXTS = 8192
"""Prompts with their answers whose ids are kept: a small task draws the same ones again and again."""


class WholeDocuments:
    """A `RowSource` of documents (ids with start and end). target_positions: for each document the places that are
    learned (tokens[place] is predicted from what stands before it); None: all. max_micro_batch_tokens: what a
    micro-batch reads at most, padding included. How many documents that allows for follows from the longest document of
    the whole step, so that every process makes as many micro-batches as the others."""

    def __init__(
        self,
        documents: Sequence[TokenIds],
        *,
        target_positions: Sequence[TokenIds] | None = None,
        max_micro_batch_tokens: int = 8192,
    ):
        if not documents:
            raise DataError("there is no document to learn from; add text")
        self.documents, self.target_positions = documents, target_positions
        self.max_micro_batch_tokens = max_micro_batch_tokens

    def limit_micro_batch_size(self, rows: range, micro_batch_size: int, seed: int) -> int:
        longest = max(len(self.documents[index]) for index in epoch_indices(len(self.documents), seed, rows)) - 1
        return min(micro_batch_size, max(1, self.max_micro_batch_tokens // longest))

    def micro_batches(self, rows: range, micro_batch_size: int, seed: int) -> list[TokenBatch]:
        return shuffled_batches(self, rows, micro_batch_size, seed)

    def __len__(self) -> int:
        return len(self.documents)

    def collate(self, indices: Sequence[int]) -> TokenBatch:
        """Make a batch of these documents."""
        places = None if self.target_positions is None else [self.target_positions[index] for index in indices]
        return collate_documents([self.documents[index] for index in indices], places)

    def fingerprint(self) -> dict[str, Any]:
        return {"loader": "whole documents", "data": hash_documents(self.documents)}


def collate_documents(documents: Sequence[TokenIds], target_positions: Sequence[TokenIds] | None = None) -> TokenBatch:
    """Every document as a row; where `target_positions` are given, only they have targets."""
    tokens = torch.from_numpy(pad([ids[:-1] for ids in documents], 0))
    targets = np.full(tokens.shape, IGNORE_INDEX)
    for number, ids in enumerate(documents):
        places = np.arange(1, len(ids)) if target_positions is None else np.asarray(target_positions[number], np.int64)
        targets[number, places - 1] = np.asarray(ids)[places]
    return TokenBatch(tokens, torch.from_numpy(targets), token_count=sum(len(ids) - 1 for ids in documents))


def hash_documents(documents: Sequence[TokenIds]) -> str:
    """sha256 of all ids, and of where each document ends."""
    digest = hashlib.sha256()
    for ids in documents:
        digest.update(np.asarray([len(ids), *ids], "<i8").tobytes())
    return digest.hexdigest()


class Demonstrations:
    """A `RowSource` of problems of the training split with their answers; only the answer and its end are learned. Row
    i is problem i: there is no data set and no epoch.

    num_examples: the first so many, again and again; None: every row is a new problem."""

    def __init__(self, task: Task, tokenizer: Tokenizer, *, num_examples: int | None = None):
        self.task, self.tokenizer, self.num_examples = task, tokenizer, num_examples
        self.problems = TaskSplit(task)
        self.encode_pieces = functools.lru_cache(MAX_CACHED_TEXTS)(tokenizer.encode_pieces)

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
        prompt, completion = self.encode_pieces(problem.prompt, answer)
        return [self.tokenizer.start_token_id, *prompt], [*completion, self.tokenizer.eos_token_id]

    def fingerprint(self) -> dict[str, Any]:
        return {"loader": "demonstrations", "data": repr(self.task), "num_examples": self.num_examples}


def collate_demonstrations(rows: Sequence[tuple[list[int], list[int]]]) -> TokenBatch:
    """Prompts with their answers, of which only the answers are learned."""
    answers = [range(len(prompt), len(prompt) + len(answer)) for prompt, answer in rows]
    return collate_documents([[*prompt, *answer] for prompt, answer in rows], answers)
