"""Steps with labels, for process reward models: TRL's format of stepwise supervision.

      {"prompt": "...", "completions": ["first step", "second step"], "labels": [true, false]}

A label is true or false, or the share of continuations from there that were right (Math-Shepherd, arXiv:2312.08935). A
row is the prompt and then each step with its separator behind it; the label stands at the separator's last token, and
nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.data.batch import pad_with_positions
from llm_quest.data.document import DropReport
from llm_quest.data.loader import length_grouped_batches
from llm_quest.data.records import Record, TrackedRow, parse_rows
from llm_quest.data.row_forms import STEP_FORMS, select_form
from llm_quest.errors import DataError

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class LabeledSteps:
    """prompt: the question. steps, labels: of one solution, labels from 0 to 1. where: file:line. weight: how
    often it is seen in an epoch."""

    question: str
    steps: tuple[str, ...]
    labels: tuple[float, ...]
    where: str = ""
    weight: float = 1.0

    @property
    def prompt(self) -> list[dict[str, str]]:
        """By which rows are held out."""
        return [{"role": "user", "content": self.question}]


@dataclass(frozen=True, eq=False)
class TokenizedSteps:
    """input_ids (T,), and of each step the index of its last token and its label."""

    input_ids: tuple[int, ...]
    ends: tuple[int, ...]
    labels: tuple[float, ...]

    @property
    def length(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class StepBatch:
    """Solutions as rows, with a label where a step ends. input_ids, position_ids (R,T): padded on the right. labels
    (R,T): NaN where no step ends."""

    input_ids: Int[Tensor, "R T"]
    position_ids: Int[Tensor, "R T"]
    labels: Float[Tensor, "R T"]
    token_count: int | None = field(default=None, repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.position_ids >= 0).sum()) if self.token_count is None else self.token_count

    def to(self, device: torch.device | str) -> StepBatch:
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "position_ids", "labels")}
        return replace(self, **moved, token_count=self.num_tokens)


def read_labeled_steps(records: Iterable[Record], drop_report: DropReport) -> list[LabeledSteps]:
    """The rows that can be learned from; the report counts what was dropped."""
    kept = []
    for labeled in parse_rows(records, parse_labeled_steps, drop_report):
        size = sum(len(step.encode()) for step in labeled.steps)
        if labeled.steps:
            drop_report.keep(size)
            kept.append(labeled)
        else:
            drop_report.drop("no steps", size)
    return kept


def parse_labeled_steps(record: Record) -> LabeledSteps:
    """Parse one row. RowError with file and line where it is not in the format."""
    row, where = TrackedRow.wrap(record.row), record.where
    parts = select_form(STEP_FORMS, row, where).parse(row, where)
    return LabeledSteps(parts.question, parts.steps, parts.labels, where, record.weight)


def tokenize_steps(
    rows: Sequence[LabeledSteps], start: Sequence[int], encode: Encode, separator: str, max_length: int,
    drop_report: DropReport,
) -> list[TokenizedSteps]:  # fmt: skip
    """Rows of at most `max_length` tokens. start: ids before every prompt. Prompt and steps are encoded one by one, so
    that no token lies across a step's end; a row that is too long is cut on the prompt's left, and dropped where its
    steps alone do not fit. DataError where nothing is left."""
    between, kept = tuple(encode(separator)), list[TokenizedSteps]()
    for row in rows:
        ids, ends = list[int](), list[int]()
        for step in row.steps:
            ids += [*encode(step), *between]
            ends.append(len(ids) - 1)
        prompt = [*start, *encode(row.question)][-max(0, max_length - len(ids)) or None :]
        if len(ids) >= max_length:
            drop_report.drop(f"the steps alone are longer than a row of {max_length} tokens", 0)
            continue
        kept.append(TokenizedSteps((*prompt, *ids), tuple(len(prompt) + end for end in ends), row.labels))
    if rows and not kept:
        raise DataError(f"no row's steps fit into {max_length} tokens; raise sequence_length")
    return kept


class StepDataset:
    """A `RowSource` of labeled steps, those of like length together."""

    def __init__(self, rows: Sequence[TokenizedSteps]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def hash(self) -> str:
        """sha256 of all ids and labels."""
        text = repr([(row.input_ids, row.ends, row.labels) for row in self.rows])
        return hashlib.sha256(text.encode()).hexdigest()

    def micro_batches(self, rows: range, micro_batch_size: int, seed: int) -> list[StepBatch]:
        return length_grouped_batches(self, rows, micro_batch_size, seed)

    def fingerprint(self) -> dict[str, Any]:
        return {"loader": "labelled steps", "data": self.hash}

    def item_length(self, index: int) -> int:
        return self.rows[index].length

    def collate(self, indices: Sequence[int]) -> StepBatch:
        """A batch of these rows."""
        rows = [self.rows[number] for number in indices]
        tokens, positions = pad_with_positions([row.input_ids for row in rows])
        labels = np.full(tokens.shape, np.nan, np.float32)
        for number, one in enumerate(rows):
            labels[number, list(one.ends)] = one.labels
        return StepBatch(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(labels))
