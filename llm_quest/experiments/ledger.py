"""The ledger of experiments: one JSON object a line, appended and never edited, in files that can be merged.

    claim     what is asked, written before the first run: metric, direction, delta, cap, arms, settings, code, seeds
    started   a run, before its first step, so that a run whose end was left out shows
    run       the same run at its end: status, metrics, cost
    verdict   of an arm, with the numbers that decide it
    confirmation   an experiment is asked once more, on the test half of the held-out data
    repetition   the same question was asked of other seeds, on the same held-out data
    prediction, outcome   of a ladder: the loss that it predicts, before the run; how far it was

A row's `id` is a hash of its content, and `parent` the id of the row before it of the same experiment: an edited row
and a missing one are found (`find_faults`), and the rows of several files are one set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from llm_quest.contracts import LogFn
from llm_quest.errors import DataError, UsageError
from llm_quest.files import append_lines, atomic_write_text, fsync_path, iter_lines
from llm_quest.progress import utc_now

Row = dict[str, Any]
KEYS = {"kind": None, "experiment": None, "id": None, "parent": "", "time": ""}
"""The texts of every row; None: it must be there."""


def row_id(row: Mapping[str, Any]) -> str:
    """The hash of a row's content."""
    content = {key: value for key, value in row.items() if key != "id"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_rows(file: Path, log: LogFn) -> list[Row]:
    """All rows of a file. A line that is no row, such as a last one that was cut, is named and skipped. DataError for
    a file that cannot be read."""
    rows = []
    try:
        with file.open("rb") as handle:
            for number, line in iter_lines(handle):
                try:
                    rows.append(parse_row(line))
                except (ValueError, TypeError, RecursionError):
                    log(f"{file}:{number}: not a whole row ({len(line)} bytes), skipped; its experiment adds it again")
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}") from None
    return rows


def parse_row(line: bytes) -> Row:
    """A row with the fields that every kind has. TypeError or ValueError for another line."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise TypeError(f"a row is {type(row).__name__}")
    if not all(isinstance(row.get(key, default), str) for key, default in KEYS.items()):
        raise TypeError(f"one of {', '.join(KEYS)} is no text")
    json.dumps(row, ensure_ascii=False).encode()  # ValueError for half of a surrogate pair, which cannot be written
    return row


def find_faults(rows: Sequence[Row]) -> list[str]:
    """Rows that were edited, and rows that others name and that are missing."""
    known = {row["id"] for row in rows}
    edited = [f"row {row['id']} of {row['experiment']} was edited" for row in rows if row_id(row) != row["id"]]
    missing = [
        f"{row['experiment']} lacks the row before {row['id']} ({row['parent']})"
        for row in rows if row.get("parent") and row["parent"] not in known
    ]  # fmt: skip
    return edited + missing


@dataclass
class Ledger:
    """A ledger's file, which need not be there yet."""

    file: Path
    log: LogFn = lambda text: None

    def rows(self) -> list[Row]:
        return read_rows(self.file, self.log) if self.file.exists() else []

    def of(self, experiment: str) -> list[Row]:
        return [row for row in self.rows() if row["experiment"] == experiment]

    def append(self, kind: str, experiment: str, content: Mapping[str, Any]) -> Row:
        """Add a row, durable when this returns. A row of the same kind and content that is there already is not
        written again, whatever command line (`command`) it is of: that one is returned."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.file}.lock"):
            own_rows = self.of(experiment)
            fixed = {key: value for key, value in content.items() if key != "command"}
            same = [row for row in own_rows if row["kind"] == kind and all(row.get(k) == v for k, v in fixed.items())]
            if same:
                return same[0]
            parent = own_rows[-1]["id"] if own_rows else ""
            row = {"kind": kind, "experiment": experiment, "parent": parent, "time": utc_now(), **content}
            row["id"] = row_id(row)
            append_lines(self.file, [json.dumps(row, ensure_ascii=False, allow_nan=False)])
            fsync_path(self.file)
        return row


def merge_ledgers(files: Sequence[Path], into: Path, log: LogFn) -> int:
    """Write all rows of `files` and of `into` to `into`, each once, by time; how many are new there."""
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file}: there is no such ledger")
    into.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{into}.lock"):
        before = read_rows(into, log) if into.exists() else []
        rows = {row["id"]: row for file in files for row in read_rows(file, log)} | {row["id"]: row for row in before}
        ordered = sorted(rows.values(), key=lambda row: (row.get("time", ""), row["id"]))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in in_chain_order(ordered))
        atomic_write_text(into, text)
    return len(rows) - len(before)


def in_chain_order(rows: Iterable[Row]) -> list[Row]:
    """The rows with every parent before its child, otherwise in their order."""
    waiting, ordered, there = list(rows), list[Row](), set[str]()
    known = {row["id"] for row in waiting}
    while waiting:
        ready = [row for row in waiting if row.get("parent", "") in there or row.get("parent", "") not in known]
        if not ready:  # parents in a circle, which only an editor makes
            return ordered + waiting
        ordered += ready
        there |= {row["id"] for row in ready}
        waiting = [row for row in waiting if row["id"] not in there]
    return ordered


def experiments(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each experiment, the newest experiment last."""
    by_experiment: dict[str, list[Row]] = {}
    for row in rows:
        by_experiment.setdefault(row["experiment"], []).append(row)
    return by_experiment


def find_experiment(names: Iterable[str], name: str, file: Path) -> str:
    """The experiment of this name, or the only one whose name begins so. UsageError for none and for several."""
    known = list(names)
    matching = [one for one in known if one == name] or [one for one in known if one.startswith(name)]
    if len(matching) != 1:
        newest = ", ".join(known[-8:]) or "none"
        raise UsageError(f"{len(matching)} experiments of {file} are called {name}; the newest are: {newest}")
    return matching[0]
