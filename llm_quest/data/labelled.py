"""Texts with labels: rows {"text": ..., "label": ...} of CSV, TSV, JSON or JSON lines become ids and class numbers.

A text is encoded as transformers encodes one, so that an exported classifier reads there what it read here. One that
is too long loses its end, and it is said how many did."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from llm_quest.data.documents import Ledger
from llm_quest.data.records import Record
from llm_quest.data.template import Messages
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError


@dataclass(frozen=True)
class LabelledText:
    """A text and what it is. where: file:line."""

    text: str
    label: str
    where: str = ""

    @property
    def prompt(self) -> Messages:
        """For holding apart: the same text is never on both sides."""
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class LabelBatch:
    """tokens, positions (R,T), padded on the right; labels (R,): class numbers."""

    tokens: Int[Tensor, "R T"]
    positions: Int[Tensor, "R T"]
    labels: Int[Tensor, " R"]
    counted: int | None = field(default=None, repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding. Known on the host after `to`."""
        return int((self.positions >= 0).sum()) if self.counted is None else self.counted

    def to(self, device: torch.device | str) -> LabelBatch:
        moved = [x.to(device, non_blocking=True) for x in (self.tokens, self.positions, self.labels)]
        return replace(self, tokens=moved[0], positions=moved[1], labels=moved[2], counted=self.num_tokens)


class Labels:
    """A `by_length.Source` of texts as ids. names: the classes, in the order of their numbers."""

    def __init__(self, rows: Sequence[np.ndarray], classes: Sequence[int], names: Sequence[str]):
        self.rows, self.classes, self.names = rows, classes, tuple(names)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def hash(self) -> str:
        told = hashlib.sha256(repr((self.names, list(self.classes), [len(row) for row in self.rows])).encode())
        told.update(b"".join(row.tobytes() for row in self.rows))
        return told.hexdigest()

    def size(self, number: int) -> int:
        return len(self.rows[number])

    def batch(self, numbers: Sequence[int]) -> LabelBatch:
        shape = (len(numbers), max(self.size(number) for number in numbers))
        tokens, positions = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        for r, number in enumerate(numbers):
            size = self.size(number)
            tokens[r, :size], positions[r, :size] = self.rows[number], np.arange(size)
        labels = torch.tensor([self.classes[number] for number in numbers])
        return LabelBatch(torch.from_numpy(tokens), torch.from_numpy(positions), labels)


def labelled(
    records: Iterable[Record], ledger: Ledger, *, text: str = "text", label: str = "label"
) -> list[LabelledText]:
    """Rows with the columns of these names; empty texts are dropped and counted."""
    kept = []
    for record in records:
        for column in (text, label):
            if column not in record.row:
                raise DataError(
                    f"{record.where} has no {column!r}; it has {', '.join(map(str, record.row)) or 'nothing'}: "
                    "name the columns with data.text and data.label"
                )
        said, called = record.row[text], record.row[label]
        if not isinstance(said, str) or not isinstance(called, str | int | bool) or called == "":
            raise DataError(f"{record.where}: {text!r} must be text and {label!r} text or a whole number")
        if said.strip():
            ledger.keep(len(said.encode()))
            kept.append(LabelledText(said, str(called), record.where))
        else:
            ledger.drop("empty text", len(said.encode()))
    return kept


def class_names(texts: Sequence[LabelledText]) -> tuple[str, ...]:
    """The labels in order. DataError for fewer than two."""
    names = sorted({one.label for one in texts})
    if len(names) < 2:
        raise DataError(f"all {len(texts)} texts have the label {names}; a classifier needs two labels or more")
    return tuple(names)


def as_labels(
    texts: Sequence[LabelledText], names: Sequence[str], tokenizer: Tokenizer, length: int, ledger: Ledger
) -> Labels:
    """Ids and class numbers."""
    rows = [np.array(ids_of(tokenizer, one.text, length), dtype=np.int64) for one in texts]
    cut = sum(len(tokenizer.encode(one.text)) > length for one in texts)
    if cut:
        ledger.note(f"{cut} texts lost their end beyond {length} tokens")
    number = {name: i for i, name in enumerate(names)}
    unknown = [one for one in texts if one.label not in number]
    if unknown:
        raise DataError(f"{unknown[0].where}: the model has no label {unknown[0].label!r}; it has {', '.join(names)}")
    return Labels(rows, [number[one.label] for one in texts], names)


def ids_of(tokenizer: Tokenizer, text: str, length: int) -> list[int]:
    """The first `length` ids of a text."""
    return (tokenizer.encode(text) or [tokenizer.start_id])[:length]
