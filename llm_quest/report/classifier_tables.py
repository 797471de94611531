"""What the report shows of a classifier: how often each label occurs, and which label was said for which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm_quest.report.record import RunRecord, TableRow

MAX_MATRIX_LABELS = 20
MAX_ROWS = 50
COUNTS_HEAD = ("label", "rightly said", "wrongly said", "wrongly left out", "rightly left out", "F1")


def format_count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def label_rows(record: RunRecord) -> Iterator[TableRow]:
    """(label, items to train on, held-out items); of many labels the most frequent."""
    counts = record.data.get("label_counts") or {}
    ordered = list(counts.items())
    if len(ordered) > MAX_ROWS:
        ordered = sorted(ordered, key=lambda one: -one[1][0])[:MAX_ROWS]
    for label, (train, held_out) in ordered:
        yield str(label), format_count(train), format_count(held_out)
    if len(counts) > MAX_ROWS:
        yield f"(and {len(counts) - MAX_ROWS:,} rarer ones)", "", ""


def confusion_rows(record: RunRecord) -> Iterator[TableRow]:
    """A head, then what was said for each label: of few labels the matrix, of many the most frequent confusions; of a
    multi-label classifier the four cases of each label."""
    labels = [str(label) for label in record.confusion.get("labels") or []]
    matrix, counts = record.confusion.get("matrix") or [], record.confusion.get("counts") or []
    if labels and len(labels) == len(counts):
        yield COUNTS_HEAD
        yield from (count_row(label, *four) for label, four in list(zip(labels, counts, strict=True))[:MAX_ROWS])
    elif labels and len(labels) == len(matrix):
        yield from (
            confusion_matrix_rows(labels, matrix) if len(labels) <= MAX_MATRIX_LABELS else frequent_rows(labels, matrix)
        )


def count_row(label: str, right: int, wrong: int, missed: int, rest: int) -> TableRow:
    f1 = 2 * right / (2 * right + wrong + missed) if right else 0.0
    return (label, *map(format_count, (right, wrong, missed, rest)), f"{f1:.3f}")


def confusion_matrix_rows(labels: list[str], matrix: list[list[int]]) -> Iterator[TableRow]:
    yield ("is \\ was called", *labels)
    for label, counts in zip(labels, matrix, strict=True):
        yield (label, *map(format_count, counts))


def frequent_rows(labels: list[str], matrix: list[list[int]]) -> Iterator[TableRow]:
    yield "is, was called", "times"
    pairs = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if n and i != j]
    for n, i, j in sorted(pairs, key=lambda one: -one[0])[:MAX_ROWS]:
        yield f"{labels[i]}, {labels[j]}", format_count(n)
