"""Document, and DropReport: what of the data was used, what was left out and why, and which keys of rows nothing
read."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llm_quest.errors import DataError, RowError

MAX_LISTED_ROWS, MAX_SHOWN_PLACES = 200, 9
"""Skipped rows that a run's data.json lists; reasons that an error shows, and rows beside the first of each."""


@dataclass(frozen=True)
class Document:
    """One text with a beginning and an end. source: where it came from; line: the line of that file on which it
    begins; weight: how often it is seen in an epoch."""

    text: str
    source: str
    line: int = 1
    weight: float = 1.0

    @cached_property
    def nbytes(self) -> int:
        """Bytes in UTF-8, the unit of bits per byte."""
        return len(self.text.encode())

    @cached_property
    def hash(self) -> str:
        """sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass
class DropReport:
    """What was kept, and what was dropped and why, in documents and bytes. Files that were never opened count their
    size. skipped: rows that cannot be used, by kind; skipped_rows: the first of them, each with file, line and reason;
    skipped_places: the same by reason.
    unused_keys: keys of rows that nothing read, each with the number of rows that have it."""

    kept: list[int] = field(default_factory=lambda: [0, 0])
    dropped: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files_with_separator: list[int] = field(default_factory=lambda: [0, 0])
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_rows: list[str] = field(default_factory=list)
    skipped_places: dict[str, list[str]] = field(default_factory=dict)
    unused_keys: Counter[str] = field(default_factory=Counter)

    def keep(self, nbytes: int) -> None:
        self.kept = [self.kept[0] + 1, self.kept[1] + nbytes]

    def drop(self, reason: str, nbytes: int) -> None:
        count, size = self.dropped.get(reason, [0, 0])
        self.dropped[reason] = [count + 1, size + nbytes]

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def note_separator(self, separator: str, *, in_text: bool) -> None:
        """Count the files that hold the separator. A separator that is in no file makes one document of each, which a
        note says (a shell passes \\n as two characters)."""
        num_found, read = self.files_with_separator
        self.files_with_separator = [num_found + in_text, read + 1]
        silent = f"the separator {separator!r} is in none of the files: each is one document"
        if silent in self.notes:
            self.notes.remove(silent)
        if not self.files_with_separator[0]:
            self.note(silent)

    def skip(self, error: RowError) -> None:
        """Count a row that cannot be used."""
        self.skipped[error.kind] += 1
        if len(self.skipped_rows) < MAX_LISTED_ROWS:
            self.skipped_rows.append(str(error))
            self.skipped_places.setdefault(error.reason, []).append(error.where)

    def count_unused_keys(self, keys: Iterable[str]) -> None:
        """Count the keys of a row that nothing read, once a row."""
        self.unused_keys.update(set(keys))

    def require_rows(
        self,
        used: int,
        source: str,
        *,
        strict: bool = False,
        remedy: str = "with data.strict=false these are left out and counted",
    ) -> None:
        """DataError with the rows that cannot be used, if none is left, or if there are any and `strict` is set.
        remedy: what to do about them, where the reader has no data.strict."""
        if self.skipped and (strict or not used):
            ending = remedy if used else "no row is left"
            raise DataError("\n".join([f"{source}: {self.describe_skipped()}; {ending}", *self.shown_rows()]))

    def describe_skipped(self) -> str:
        """How many rows cannot be used, by kind."""
        kinds = ", ".join(f"{count:,} x {kind}" for kind, count in self.skipped.most_common())
        return f"{self.skipped.total():,} {'row' if self.skipped.total() == 1 else 'rows'} cannot be used ({kinds})"

    def shown_rows(self) -> list[str]:
        """The skipped rows for a message: one line for each reason, with the places of the first rows that have it (:3
        is line 3 of the same file)."""
        shown = []
        for reason, (first, *others) in self.skipped_places.items():
            file = first.rpartition(":")[0]
            again = ", ".join(other.removeprefix(file) for other in others[:MAX_SHOWN_PLACES])
            shown.append(f"{first}: {reason}" + (f" (the same at {again})" if again else ""))
        named = sum(min(len(places), 1 + MAX_SHOWN_PLACES) for places in self.skipped_places.values())
        more = self.skipped.total() - named
        return [*shown, *([f"... and {more:,} more rows"] if more > 0 else [])]

    def remarks(self) -> list[str]:
        """What a run says once about its rows: rows that were skipped, keys that nothing read, and the notes."""
        notes = []
        if self.skipped:
            notes.append(f"skipped: {self.describe_skipped()}, first: {self.skipped_rows[0]}")
        if self.unused_keys:
            shown = (
                (key if key.strip() and key.isprintable() else repr(key), self.unused_keys[key])
                for key in self.unused_keys
            )
            keys = ", ".join(f"{key} ({count:,})" for key, count in sorted(shown))
            notes.append(f"keys that nothing reads, and in how many rows: {keys}")
        return notes + self.notes

    def summary_lines(self) -> list[str]:
        """The number of dropped items by reason, and the remarks."""
        return [f"left out: {n:,} {reason}" for reason, (n, _) in sorted(self.dropped.items())] + self.remarks()

    def row_facts(self) -> dict[str, Any]:
        """What a run's data.json keeps about its rows."""
        return {
            "dropped": {reason: count for reason, (count, _) in sorted(self.dropped.items())},
            "skipped": {"rows": self.skipped.total(), "kinds": dict(self.skipped), "first": list(self.skipped_rows)},
            "unused_keys": dict(sorted(self.unused_keys.items())),
            "notes": list(self.notes),
        }

    def as_json(self) -> dict[str, Any]:
        def pair(counts: list[int]) -> dict[str, int]:
            return {"documents": counts[0], "bytes": counts[1]}

        dropped = {reason: pair(counts) for reason, counts in sorted(self.dropped.items())}
        return self.row_facts() | {"kept": pair(self.kept), "dropped": dropped}

    def lines(self) -> list[str]:
        rows = [
            ("kept", self.kept),
            *((f"dropped: {reason}", counts) for reason, counts in sorted(self.dropped.items())),
        ]
        table = [f"{name:<40} {count:>9,} documents {size:>14,} bytes" for name, (count, size) in rows]
        return table + self.remarks()
