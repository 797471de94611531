"""Texts with labels: rows {"text": ..., "label": ...} of CSV, TSV, JSON or JSON lines become ids and class numbers.

A text is encoded as transformers encodes one, so that an exported classifier reads there what it read here. A text
that is too long is truncated; the report says how many were."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from llm_quest.data.batch import pad_with_positions
from llm_quest.data.document import DropReport
from llm_quest.data.loader import length_grouped_batches
from llm_quest.data.message_parsing import text_field
from llm_quest.data.records import Record, TrackedRow, parse_rows
from llm_quest.data.row_forms import LABELED_TEXT_FORMS, select_form
from llm_quest.data.template_sandbox import Messages
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, RowError

WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")


@dataclass(frozen=True)
class LabeledText:
    """A text and its label. where: file:line. weight: how often it is seen in an epoch."""

    text: str
    label: str
    where: str = ""
    weight: float = 1.0

    @property
    def prompt(self) -> Messages:
        """What the held-out split goes by: the same text is never on both sides."""
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class TextClassificationBatch:
    """input_ids, position_ids (R,T), padded on the right; labels (R,): class indices."""

    input_ids: Int[Tensor, "R T"]
    position_ids: Int[Tensor, "R T"]
    labels: Int[Tensor, " R"]
    token_count: int | None = field(default=None, repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding. Computed from `position_ids` on the host."""
        return int((self.position_ids >= 0).sum()) if self.token_count is None else self.token_count

    def to(self, device: torch.device | str) -> TextClassificationBatch:
        moved = [x.to(device, non_blocking=True) for x in (self.input_ids, self.position_ids, self.labels)]
        return replace(self, input_ids=moved[0], position_ids=moved[1], labels=moved[2], token_count=self.num_tokens)


class TextClassificationDataset:
    """A `RowSource` of texts as ids, those of like length together. label_names: the classes, in the order of their
    numbers."""

    def __init__(self, rows: Sequence[np.ndarray], label_ids: Sequence[int], label_names: Sequence[str]):
        self.rows, self.label_ids, self.label_names = rows, label_ids, tuple(label_names)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def hash(self) -> str:
        digest = hashlib.sha256(
            repr((self.label_names, list(self.label_ids), [len(row) for row in self.rows])).encode()
        )
        digest.update(b"".join(row.tobytes() for row in self.rows))
        return digest.hexdigest()

    def micro_batches(self, rows: range, micro_batch_size: int, seed: int) -> list[TextClassificationBatch]:
        return length_grouped_batches(self, rows, micro_batch_size, seed)

    def fingerprint(self) -> dict[str, Any]:
        return {"loader": "labeled texts", "data": self.hash}

    def item_length(self, index: int) -> int:
        return len(self.rows[index])

    def collate(self, indices: Sequence[int]) -> TextClassificationBatch:
        tokens, positions = pad_with_positions([self.rows[number] for number in indices])
        labels = torch.tensor([self.label_ids[number] for number in indices])
        return TextClassificationBatch(torch.from_numpy(tokens), torch.from_numpy(positions), labels)


def read_labeled_texts(records: Iterable[Record], drop_report: DropReport) -> list[LabeledText]:
    """Rows with text and label; empty texts are dropped and counted."""
    kept = []
    for found in parse_rows(records, parse_labeled_text, drop_report):
        size = len(found.text.encode())
        if found.text.strip():
            drop_report.keep(size)
            kept.append(found)
        else:
            drop_report.drop("empty text", size)
    return kept


def parse_labeled_text(record: Record) -> LabeledText:
    """Parse one row. RowError with file and line where it has no text, or no label that is text or a whole number."""
    row, where = TrackedRow.wrap(record.row), record.where
    select_form(LABELED_TEXT_FORMS, row, where)
    label = row["label"]
    if not isinstance(label, str | int | bool) or label == "":
        raise RowError(where, "a label of another kind", f"'label' is {label!r:.60}; expected text or a whole number")
    return LabeledText(text_field(row, "text", where), str(label).strip(), where, record.weight)


def collect_label_names(texts: Sequence[LabeledText]) -> tuple[str, ...]:
    """The labels in order: whole numbers by value, so that label 2 of 0..11 is class 2, others as text. DataError for
    fewer than two.

    Commonly got wrong: numbers sorted as text, where "10" comes before "2"."""
    found = {one.label for one in texts}
    names = (
        sorted(found, key=lambda name: (int(name), name)) if all(map(WHOLE_NUMBER.fullmatch, found)) else sorted(found)
    )
    if len(names) < 2:
        raise DataError(f"all {len(texts)} texts have the label {names}; a classifier needs two labels or more")
    return tuple(names)


def encode_labeled_texts(
    texts: Sequence[LabeledText],
    label_names: Sequence[str],
    tokenizer: Tokenizer,
    max_length: int,
    drop_report: DropReport,
) -> TextClassificationDataset:
    """Texts as ids and labels as class indices."""
    rows = [np.array(encode_truncated(tokenizer, one.text, max_length), dtype=np.int64) for one in texts]
    cut = sum(len(tokenizer.encode(one.text)) > max_length for one in texts)
    if cut:
        drop_report.note(f"{cut} texts lost their end beyond {max_length} tokens")
    number = {name: i for i, name in enumerate(label_names)}
    unknown = [one for one in texts if one.label not in number]
    if unknown:
        raise DataError(
            f"{unknown[0].where}: the model has no label {unknown[0].label!r}; it has {', '.join(label_names)}"
        )
    return TextClassificationDataset(rows, [number[one.label] for one in texts], label_names)


def encode_truncated(tokenizer: Tokenizer, text: str, max_length: int) -> list[int]:
    """The first `max_length` ids of a text."""
    return (tokenizer.encode(text) or [tokenizer.start_token_id])[:max_length]
