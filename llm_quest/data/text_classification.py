"""Texts with labels: rows {"text": ..., "label": ...} of CSV, TSV, JSON or JSON lines become ids and class numbers;
with a list of labels (multi-label) each of them is a class of its own, on or off.

A text is encoded as transformers encodes one, so that an exported classifier reads there what it read here. A text
that is too long is truncated; the report says how many were."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.data.batch import MULTI_LABEL, SINGLE_LABEL, pad_with_positions
from llm_quest.data.conversations import first_question_hash
from llm_quest.data.document import DropReport
from llm_quest.data.loader import length_grouped_batches
from llm_quest.data.message_parsing import parse_json_cell, text_field
from llm_quest.data.records import Record, TrackedRow, parse_rows
from llm_quest.data.row_forms import LABELED_TEXT_FORMS, select_form
from llm_quest.data.stratified_split import choose_held_out
from llm_quest.data.template_sandbox import Messages
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, RowError

WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")


class Labeled(Protocol):
    """What has labels: a row of texts, or of images."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def where(self) -> str: ...

    @property
    def is_list(self) -> bool: ...


@dataclass(frozen=True)
class LabeledText:
    """A text and its labels, one or any number. where: file:line. weight: how often it is seen in an epoch. is_list:
    whether the row has a list of labels."""

    text: str
    labels: tuple[str, ...]
    where: str = ""
    weight: float = 1.0
    is_list: bool = False

    @property
    def prompt(self) -> Messages:
        """What the held-out split goes by: the same text is never on both sides."""
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class TextClassificationBatch:
    """input_ids, position_ids (R,T), padded on the right; labels (R,): class indices; multi-label: (R,C), 1 or 0."""

    input_ids: Int[Tensor, "R T"]
    position_ids: Int[Tensor, "R T"]
    labels: Int[Tensor, " R"] | Float[Tensor, "R C"]
    token_count: int | None = field(default=None, repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding. Computed from `position_ids` on the host."""
        return int((self.position_ids >= 0).sum()) if self.token_count is None else self.token_count

    def to(self, device: torch.device | str) -> TextClassificationBatch:
        moved = [x.to(device, non_blocking=True) for x in (self.input_ids, self.position_ids, self.labels)]
        return replace(self, input_ids=moved[0], position_ids=moved[1], labels=moved[2], token_count=self.num_tokens)


class TextClassificationDataset:
    """A `RowSource` of texts as ids, those of like length together. label_ids: the classes of each text, one unless
    is_multi_label. label_names: the classes, in the order of their numbers."""

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        label_ids: Sequence[tuple[int, ...]],
        label_names: Sequence[str],
        is_multi_label: bool = False,
    ):
        self.rows, self.label_ids, self.label_names = rows, label_ids, tuple(label_names)
        self.is_multi_label = is_multi_label

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def hash(self) -> str:
        plain = list(self.label_ids) if self.is_multi_label else [one for (one,) in self.label_ids]
        digest = hashlib.sha256(repr((self.label_names, plain, [len(row) for row in self.rows])).encode())
        digest.update(b"".join(row.tobytes() for row in self.rows))
        return digest.hexdigest()

    @cached_property
    def label_counts(self) -> list[int]:
        """How many texts have each label."""
        counts = Counter(label for labels in self.label_ids for label in labels)
        return [counts[label] for label in range(len(self.label_names))]

    def micro_batches(self, rows: range, micro_batch_size: int, seed: int) -> list[TextClassificationBatch]:
        return length_grouped_batches(self, rows, micro_batch_size, seed)

    def fingerprint(self) -> dict[str, Any]:
        return {"loader": "labeled texts", "data": self.hash}

    def item_length(self, index: int) -> int:
        return len(self.rows[index])

    def collate(self, indices: Sequence[int]) -> TextClassificationBatch:
        tokens, positions = pad_with_positions([self.rows[number] for number in indices])
        labels = self.label_tensor([self.label_ids[number] for number in indices])
        return TextClassificationBatch(torch.from_numpy(tokens), torch.from_numpy(positions), labels)

    def label_tensor(self, label_sets: Sequence[tuple[int, ...]]) -> Tensor:
        """(R,) class numbers; multi-label: (R,C), 1 where a text has the label."""
        if not self.is_multi_label:
            return torch.tensor([label for (label,) in label_sets])
        targets = torch.zeros(len(label_sets), len(self.label_names))
        for row, labels in zip(targets, label_sets, strict=True):
            row[list(labels)] = 1
        return targets


def read_labeled_texts(
    records: Iterable[Record], drop_report: DropReport, *, label_separator: str | None = None
) -> list[LabeledText]:
    """Rows with text and label; empty texts are dropped and counted. label_separator: splits a label of text into
    several."""
    kept = []
    for labeled in parse_rows(records, partial(parse_labeled_text, label_separator=label_separator), drop_report):
        size = len(labeled.text.encode())
        if labeled.text.strip():
            drop_report.keep(size)
            kept.append(labeled)
        else:
            drop_report.drop("empty text", size)
    return kept


def parse_labeled_text(record: Record, *, label_separator: str | None = None) -> LabeledText:
    """Parse one row. RowError with file and line where it has no text, or labels that are neither text nor whole
    numbers."""
    row, where = TrackedRow.wrap(record.row), record.where
    form = select_form(LABELED_TEXT_FORMS, row, where)
    key = form.keys[-1]
    labels, is_list = parse_labels(row, key, where, label_separator)
    return LabeledText(text_field(row, "text", where), labels, where, record.weight, is_list)


def parse_labels(row: TrackedRow, key: str, where: str, separator: str | None) -> tuple[tuple[str, ...], bool]:
    """(the labels of a row, whether it has a list of them). separator: splits a label of text into several."""
    given = row[key]
    if isinstance(given, str) and key == "labels":
        given = parse_json_cell(given, where)
    if isinstance(given, str) and separator is not None:
        given = [part.strip() for part in given.split(separator) if part.strip()]
    is_list = isinstance(given, list | tuple)
    labels = tuple(parse_label(one, key, where) for one in (given if is_list else [given]))
    return tuple(dict.fromkeys(labels)), is_list


def parse_label(value: Any, key: str, where: str) -> str:
    """A label as text. Whole numbers that a table holds as 1.0, as pandas writes a column with gaps, are 1."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if not isinstance(value, str | int | bool) or value == "":
        reason = f"{key!r} is {value!r:.60}; expected text or a whole number, or a list of them"
        raise RowError(where, "a label of another kind", reason)
    return str(value).strip()


def problem_type_of(texts: Sequence[Labeled], wanted: str | None = None) -> str:
    """transformers' `problem_type`: single_label_classification, or multi_label_classification where a row has a list
    of labels. DataError for lists where one label is wanted."""
    lists = [text for text in texts if text.is_list]
    if wanted == SINGLE_LABEL and lists:
        raise DataError(
            f"{lists[0].where}: has a list of labels, and the problem type is {SINGLE_LABEL}: give one label, or "
            f"problem_type={MULTI_LABEL}"
        )
    return wanted or (MULTI_LABEL if lists else SINGLE_LABEL)


def split_labeled_texts(texts: Sequence[LabeledText], held_out: float) -> tuple[list[LabeledText], list[LabeledText]]:
    """(training, held out): about this share of the texts of each label; equal texts stay on one side."""
    keys = [first_question_hash(text.prompt) for text in texts]
    chosen = set(choose_held_out(keys, [text.labels for text in texts], held_out))
    return [text for i, text in enumerate(texts) if i not in chosen], [texts[i] for i in sorted(chosen)]


def collect_label_names(texts: Sequence[Labeled]) -> tuple[str, ...]:
    """The labels in order: whole numbers by value, so that label 2 of 0..11 is class 2, others as text. DataError for
    fewer than two.

    Commonly got wrong: numbers sorted as text, where "10" comes before "2"."""
    labels_found = {label for text in texts for label in text.labels}
    names = (
        sorted(labels_found, key=lambda name: (int(name), name))
        if all(map(WHOLE_NUMBER.fullmatch, labels_found))
        else sorted(labels_found)
    )
    if len(names) < 2:
        raise DataError(f"all {len(texts)} rows have the label {names}; a classifier needs two labels or more")
    return tuple(names)


def encode_labeled_texts(
    texts: Sequence[LabeledText],
    label_names: Sequence[str],
    tokenizer: Tokenizer,
    max_length: int,
    drop_report: DropReport,
    is_multi_label: bool = False,
) -> TextClassificationDataset:
    """Texts as ids and labels as class indices."""
    rows = [np.array(encode_truncated(tokenizer, text.text, max_length), dtype=np.int64) for text in texts]
    cut = sum(len(tokenizer.encode(text.text)) > max_length for text in texts)
    if cut:
        drop_report.note(f"{cut} texts lost their end beyond {max_length} tokens")
    number = {name: i for i, name in enumerate(label_names)}
    for one in texts:
        if unknown := [label for label in one.labels if label not in number]:
            raise DataError(f"{one.where}: the model has no label {unknown[0]!r}; it has {', '.join(label_names)}")
    label_ids = [tuple(sorted(number[label] for label in text.labels)) for text in texts]
    return TextClassificationDataset(rows, label_ids, label_names, is_multi_label)


def encode_truncated(tokenizer: Tokenizer, text: str, max_length: int) -> list[int]:
    """The first `max_length` ids of a text."""
    return (tokenizer.encode(text) or [tokenizer.start_token_id])[:max_length]
