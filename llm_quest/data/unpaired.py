"""Unpaired preferences: one answer to a question and whether it is desirable (KTO, arXiv:2402.01306).

      {"prompt": ..., "completion": ..., "label": true}      any form of conversation with `label` or `kto_tag`
      {"prompt": ..., "chosen": ..., "rejected": ...}        a pair is a desirable and an undesirable row

A row is laid out as a preference of two answers, its own and a *mismatched* one, the answer to another question: KTO's
reference point is the mean gain of mismatched answers. `margin` is 1 for a desirable answer and -1 for an undesirable
one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_quest.data.conversations import build_conversation
from llm_quest.data.document import DropReport
from llm_quest.data.loader import shuffle_indices
from llm_quest.data.preference_pairs import PreferenceBatch
from llm_quest.data.preferences import Preference, TokenizedPreference, parse_preference
from llm_quest.data.records import Record, TrackedRow, parse_rows
from llm_quest.data.row_forms import RATED_FORMS, select_form
from llm_quest.errors import DataError

DESIRABLE, UNDESIRABLE = 1.0, -1.0


@dataclass(frozen=True)
class UnpairedBatch:
    """Rows as in TokenBatch, answers alone learned. desirable (R,): of each row's answer. reference_log_probs (R,): the
    reference's log-probability of it. kl: the reference point of the whole step, a scalar."""

    input_ids: Int[Tensor, "R T"]
    targets: Int[Tensor, "R T"]
    position_ids: Int[Tensor, "R T"]
    desirable: Bool[Tensor, " R"]
    reference_log_probs: Float[Tensor, " R"]
    kl: Float[Tensor, ""]
    token_count: int | None = field(default=None, repr=False, compare=False)
    segment_ids: ClassVar[None] = None
    prefix: ClassVar[None] = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.position_ids >= 0).sum()) if self.token_count is None else self.token_count

    def to(self, device: torch.device | str) -> UnpairedBatch:
        """The same batch on another device."""
        tensors = ("input_ids", "targets", "position_ids", "desirable", "reference_log_probs", "kl")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in tensors}
        return replace(self, **moved, token_count=self.num_tokens)


def read_unpaired(records: Iterable[Record], drop_report: DropReport) -> list[Preference]:
    """The labeled answers that can be learned from; the report counts what was dropped."""
    kept = []
    for answer in chain.from_iterable(parse_rows(records, parse_unpaired, drop_report)):
        size = sum(len(one) for one in answer.answers)
        if answer.answers[0].strip():
            drop_report.keep(size)
            kept.append(answer)
        else:
            drop_report.drop("empty answer", size)
    return kept


def parse_unpaired(record: Record) -> list[Preference]:
    """The labeled answers of one row. RowError with file and line where there is none."""
    row, where = TrackedRow.wrap(record.row), record.where
    if "chosen" in row and "rejected" in row:
        pair = parse_preference(record)
        labels = (DESIRABLE, *[UNDESIRABLE] * (len(pair.answers) - 1))
        return [replace(pair, answers=(text,), margin=label) for text, label in zip(pair.answers, labels, strict=True)]
    messages, desirable = select_form(RATED_FORMS, row, where).parse(row, where)
    talk = build_conversation(messages, row, record)
    label = DESIRABLE if desirable else UNDESIRABLE
    return [Preference(talk.messages[:-1], (talk.answer,), label, where, talk.tools, talk.weight)]


def add_mismatched_answers(
    rows: Sequence[TokenizedPreference], max_length: int, seed: int, *, more: Sequence[TokenizedPreference] = ()
) -> list[TokenizedPreference]:
    """Each row with a second answer: that of the row before it, in an order that the seed decides, or of the nearest
    before that with another question. So the mismatched answers are all the answers, each with another question.

    Differs: in the paper a row takes the answer of another row of its batch, another one in each epoch. Here the pair
    is fixed, so that the reference reads it once. more: rows to take answers from where all of these have one question
    (a small held-out part); DataError where there are none."""
    order = shuffle_indices(len(rows), seed).tolist()
    tokenized: list[TokenizedPreference] = list(rows)
    for place, number in enumerate(order):
        row = rows[number]
        others = chain((rows[order[place - back]] for back in range(1, len(rows))), more)
        other = next((one for one in others if not np.array_equal(one.prompt, row.prompt)), None)
        if other is None:
            raise DataError(
                "all rows have the same question, and KTO's reference point needs answers to other questions: take "
                "loss_type=apo_zero_unpaired, or give more rows"
            )
        answers = (row.answers[0], other.answers[0])
        tokenized[number] = replace(row, prompt=row.prompt[-(max_length - max(map(len, answers))) :], answers=answers)
    return tokenized


def repeat_answers(rows: Sequence[TokenizedPreference]) -> list[TokenizedPreference]:
    """Each row with its own answer in the place of the mismatched one, for losses that read none."""
    return [replace(row, answers=row.answers * 2) for row in rows]


def own_rows(batch: PreferenceBatch, kl: Tensor) -> UnpairedBatch:
    """The rows of a batch with their own answers. batch: of rows with mismatched answers."""
    rows = batch.chosen
    known = batch.reference_log_probs
    reference = torch.zeros(len(rows)) if known is None else known[rows]
    return UnpairedBatch(
        batch.input_ids[rows], batch.targets[rows], batch.position_ids[rows], batch.margins > 0, reference, kl
    )
