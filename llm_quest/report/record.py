"""A run folder, read for telling about it. Everything but the folder itself may be missing: a run that has just begun,
was killed, or was copied in part has a report too.

      config.yaml    the resolved settings, as text         env.json        what `quest doctor` finds (cli/machine.py)
      metrics.jsonl  step, tokens, loss, lr, grad_norm, tokens_per_second, seconds, skipped, eval/loss, ... a row;
                     a number that was not finite is null and named in "nonfinite"
      events.jsonl   time, event, ... a row                 data.json       what the text consists of, with its ledger
      plan.json      what it was to cost (cli/planning.py)  summary.json    how it ended, and the baselines
      model.json     the page and its numbers               evaluation.json  bits per byte with their interval
      samples/       step-00000200.json: {"step", "samples": [{"prompt", "text"}, ...]}
      checkpoints/   step-00000200/
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.errors import DataError

LARGEST = 64 * 2**20
SECRET = re.compile(r"TOKEN$|_KEY$|^KEY$|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
HIDDEN = "(not shown)"
TOLD_ELSEWHERE = ("eval/loss", "eval/bits_per_byte")


@dataclass(frozen=True)
class Sample:
    """What the model wrote after `step` steps. wanted: the right answer, where there is one."""

    step: int
    prompt: str
    text: str
    wanted: str = ""


@dataclass(frozen=True)
class Record:
    """What is known of one run. checkpoints: name -> bytes."""

    name: str
    config: str
    env: Mapping[str, Any]
    model: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    events: tuple[Mapping[str, Any], ...]
    samples: tuple[Sample, ...]
    data: Mapping[str, Any]
    plan: Mapping[str, Any]
    summary: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    checkpoints: Mapping[str, int]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a column, in the rows that have it; NaN where it was not finite."""
        found = [(row["step"], row[key]) for row in self.rows if key in row]
        return [step for step, _ in found], [math.nan if value is None else float(value) for _, value in found]

    def last(self, key: str) -> float | None:
        """The newest finite value of a column."""
        values = [value for value in self.series(key)[1] if math.isfinite(value)]
        return values[-1] if values else None

    @property
    def counted(self) -> str:
        """What its rows count as tokens: `images`, in runs that only look."""
        return str(self.data.get("counted") or "tokens")

    @property
    def scores(self) -> dict[str, tuple[list[float], list[float]]]:
        """Name -> (steps, values) of what was measured on held-out data and lies between 0 and 1 (accuracies); losses
        are told elsewhere."""
        names = dict.fromkeys(key for row in self.rows for key in row if key.startswith("eval/"))
        found = {name.removeprefix("eval/"): self.series(name) for name in names if name not in TOLD_ELSEWHERE}
        return {name: (at, values) for name, (at, values) in found.items() if all(0 <= value <= 1 for value in values)}

    @property
    def step(self) -> int:
        """Steps done, as far as the rows say."""
        return int(self.rows[-1]["step"]) if self.rows else 0


def read(folder: Path) -> Record:
    """DataError if it is no folder, holds nothing that a run writes, or a file of it is not what its name says."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; quest report takes run folders")
    if not any((folder / name).exists() for name in ("metrics.jsonl", "config.yaml", "events.jsonl", "env.json")):
        raise DataError(f"{folder} is no run folder: it holds neither metrics.jsonl nor config.yaml nor events.jsonl")
    return Record(
        name=folder.resolve().name,
        config=text_of(folder / "config.yaml"),
        env=redacted(object_of(folder / "env.json")),
        model=object_of(folder / "model.json"),
        rows=tuple(row for row in rows_of(folder / "metrics.jsonl") if type(row.get("step")) is int),
        events=tuple(rows_of(folder / "events.jsonl")),
        samples=tuple(samples_of(folder / "samples")),
        data=object_of(folder / "data.json"),
        plan=object_of(folder / "plan.json"),
        summary=object_of(folder / "summary.json"),
        evaluation=object_of(folder / "evaluation.json"),
        checkpoints=checkpoints_of(folder / "checkpoints"),
    )


def text_of(file: Path) -> str:
    """The text; empty if there is no such file."""
    if not file.is_file():
        return ""
    if file.stat().st_size > LARGEST:
        raise DataError(
            f"{file} has {file.stat().st_size:,} bytes, which no run writes; a report reads at most {LARGEST:,}"
        )
    return file.read_text(encoding="utf-8", errors="replace")


def object_of(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    text = text_of(file)
    try:
        held = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON ({error}); remove it, and the report will do without") from None
    if not isinstance(held, dict):
        raise DataError(
            f"{file} holds a {type(held).__name__}; expected a JSON object; remove it, and the report will do without"
        )
    return held


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """JSON objects, one a line. A torn last line (a run in progress or killed) is left out; any other is an error."""
    lines = text_of(file).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            if number == len(lines):
                return
            raise DataError(f"{file}:{number} is not JSON; remove the line, and the report will do without") from None
        if isinstance(row, dict):
            yield row


def samples_of(folder: Path) -> Iterator[Sample]:
    """By step; within a step in the order they were written."""
    for file in sorted(folder.glob("step-*.json")) if folder.is_dir() else ():
        held = object_of(file)
        entries = [entry for entry in held.get("samples", []) if isinstance(entry, dict)]
        yield from (
            Sample(int(held.get("step", 0)), *(str(entry.get(key) or "") for key in ("prompt", "text", "wanted")))
            for entry in entries
        )


def checkpoints_of(folder: Path) -> dict[str, int]:
    """Name -> bytes of the checkpoints that are there."""
    there = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return {
        one.name: sum(file.stat().st_size for file in one.iterdir() if file.is_file()) for one in there if one.is_dir()
    }


def redacted(held: Any) -> Any:
    """The same without what its key says is secret."""
    if isinstance(held, dict):
        return {key: HIDDEN if SECRET.search(str(key)) else redacted(value) for key, value in held.items()}
    return [redacted(value) for value in held] if isinstance(held, list) else held
