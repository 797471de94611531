"""Reads a run folder for its report. Every file may be missing: a run that has just begun, was killed, or was copied in
part has a report too.

      config.yaml    the resolved settings, as text         env.json        what `quest doctor` finds (cli/doctor.py)
      metrics.jsonl  step, tokens, loss, learning_rate, grad_norm, num_targets, tokens_per_second, train_seconds,
                     skipped_steps, eval/loss, ... a row; a run of the first version has OLD_METRICS;
                     a number that was not finite is null and named in "nonfinite"
      events.jsonl   time, event, ... a row                 data.json       the text and what was dropped
      plan.json      the predicted cost (cost/plan.py)      summary.json    how it ended, and the baselines
      model.json     the family and its config              evaluation.json  bits per byte with their interval
      confusion.json  a classifier's held-out items: labels, and how often each was said for each (matrix), or of
                     several labels the four cases of each (counts)
      samples/       step-00000200.json: {"step", "samples": [{"prompt", "text"}, ...]}
      checkpoints/   step-00000200/
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_quest.errors import DataError
from llm_quest.files import iter_lines

TableRow = tuple[str, ...]
MAX_FILE_BYTES = 64 * 2**20
SECRET_KEY = re.compile(r"TOKEN$|_KEY$|^KEY$|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
REDACTED = "(not shown)"
OLD_METRICS = {
    "lr": "learning_rate",
    "seconds": "train_seconds",
    "skipped": "skipped_steps",
    "empty": "empty_steps",
    "count": "num_targets",
    "flat": "frac_reward_zero_std",
    "truncated": "completions/clipped_ratio",
    "length": "completions/mean_length",
    "unscorable": "rewards/unscorable",
    "draws": "sampling_rounds",
    "rows_kept": "rows_trained",
    "seconds_sampling": "sampling_seconds",
    "seconds_scoring": "scoring_seconds",
}
OLD_EVENTS = {"set aside": "checkpoint_renamed", "not saved": "save_failed", "guard stop": "stopped_by_guard"}
"""Names of the first version -> current names."""
UNBOUNDED_SCORES = ("reward", "margin")
"""What held-out scores begin with that may be any number."""
EXCLUDED_SCORES = ("eval/loss", "eval/bits_per_byte", "eval/interval")


@dataclass(frozen=True)
class SampleRow:
    """What the model wrote after `step` steps. wanted: the right answer, where there is one. reward: what it earned."""

    step: int
    prompt: str
    text: str
    wanted: str = ""
    reward: str = ""


@dataclass(frozen=True)
class RunRecord:
    """The files of one run. checkpoints: name -> bytes."""

    name: str
    config: str
    env: Mapping[str, Any]
    model: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    events: tuple[Mapping[str, Any], ...]
    samples: tuple[SampleRow, ...]
    data: Mapping[str, Any]
    plan: Mapping[str, Any]
    summary: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    confusion: Mapping[str, Any]
    checkpoints: Mapping[str, int]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a column, in the rows that have it, from what was measured before the first step on; NaN
        where it was not finite."""
        first = [(0, event[key]) for event in self.events if event.get("event") == "evaluated" and key in event]
        points = first[:1] + [(row["step"], row[key]) for row in self.rows if key in row]
        return [step for step, _ in points], [math.nan if value is None else float(value) for _, value in points]

    def last(self, key: str) -> float | None:
        """The newest finite value of a column."""
        values = [value for value in self.series(key)[1] if math.isfinite(value)]
        return values[-1] if values else None

    @cached_property
    def names(self) -> dict[str, None]:
        """The columns of the metrics, in their order."""
        return dict.fromkeys(key for row in self.rows for key in row)

    @property
    def unit(self) -> str:
        """What its rows count: tokens, or images in runs of an image encoder."""
        return str(self.data.get("counted") or "tokens")

    @property
    def scores(self) -> dict[str, tuple[list[float], list[float]]]:
        """Name -> (steps, values) of what was measured on held-out data: rewards, margins, and what lies between 0 and
        1 (accuracies); without losses."""
        names = [name for name in self.names if name.startswith("eval/")]
        series_of = {name.removeprefix("eval/"): self.series(name) for name in names if name not in EXCLUDED_SCORES}
        return {
            name: (at, values)
            for name, (at, values) in series_of.items()
            if name.startswith(UNBOUNDED_SCORES) or all(0 <= value <= 1 for value in values)
        }

    @property
    def step(self) -> int:
        """The last step that a row records."""
        return int(self.rows[-1]["step"]) if self.rows else 0


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. DataError if it is no folder, holds none of a run's files, or a file has the wrong format."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; quest report takes run folders")
    if not any((folder / name).exists() for name in ("metrics.jsonl", "config.yaml", "events.jsonl", "env.json")):
        raise DataError(f"{folder} is no run folder: it holds neither metrics.jsonl nor config.yaml nor events.jsonl")
    return RunRecord(
        name=folder.resolve().name,
        config=read_text_file(folder / "config.yaml"),
        env=redact(read_optional_json(folder / "env.json")),
        model=read_optional_json(folder / "model.json"),
        rows=tuple(read_metrics(folder / "metrics.jsonl")),
        events=tuple(read_events(folder / "events.jsonl")),
        samples=tuple(read_samples(folder / "samples")),
        data=read_optional_json(folder / "data.json"),
        plan=read_optional_json(folder / "plan.json"),
        summary=read_optional_json(folder / "summary.json"),
        evaluation=read_optional_json(folder / "evaluation.json"),
        confusion=read_optional_json(folder / "confusion.json"),
        checkpoints=checkpoint_sizes(folder / "checkpoints"),
    )


def read_text_file(file: Path) -> str:
    """The text of a file; empty if there is none."""
    if not file.is_file():
        return ""
    if file.stat().st_size > MAX_FILE_BYTES:
        raise DataError(
            f"{file} has {file.stat().st_size:,} bytes, which no run writes; a report reads at most {MAX_FILE_BYTES:,}"
        )
    return file.read_text(encoding="utf-8", errors="replace")


def read_optional_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    text = read_text_file(file)
    try:
        content = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON ({error}); remove it, and the report will do without") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{file} holds a {type(content).__name__}; expected a JSON object; remove it, and the report will "
            "do without"
        )
    return content


def read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """JSON objects, one a line. A torn last line (a run in progress or killed) is left out; any other is an error."""
    lines = list(iter_lines(io.BytesIO(read_text_file(file).encode())))
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == lines[-1][0]:
                return
            raise DataError(f"{file}:{number} is not JSON; remove the line, and the report will do without") from None
        if isinstance(row, dict):
            yield row


def read_metrics(file: Path) -> Iterator[dict[str, Any]]:
    """The rows that have a step, under current names."""
    for row in read_jsonl(file):
        if type(row.get("step")) is int:
            yield {OLD_METRICS.get(name, name): value for name, value in row.items()}


def read_events(file: Path) -> Iterator[dict[str, Any]]:
    """The events, under current names."""
    for row in read_jsonl(file):
        name = row.get("event")
        yield row | {"event": OLD_EVENTS.get(name, name)} if isinstance(name, str) else row


def read_samples(folder: Path) -> Iterator[SampleRow]:
    """By step; within a step in the order they were written."""
    for file in sorted(folder.glob("step-*.json")) if folder.is_dir() else ():
        content = read_optional_json(file)
        entries = [entry for entry in content.get("samples", []) if isinstance(entry, dict)]
        for entry in entries:
            prompt, text, wanted = (str(entry.get(key) or "") for key in ("prompt", "text", "wanted"))
            reward = entry.get("reward")
            earned = f"{reward:.3g}" if isinstance(reward, int | float) else ""
            yield SampleRow(int(content.get("step", 0)), prompt, text, wanted, earned)


def checkpoint_sizes(folder: Path) -> dict[str, int]:
    """Name -> bytes of each checkpoint."""
    there = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return {
        one.name: sum(file.stat().st_size for file in one.iterdir() if file.is_file()) for one in there if one.is_dir()
    }


def redact(held_out: Any) -> Any:
    """The same value without entries whose key names a secret."""
    if isinstance(held_out, dict):
        return {key: REDACTED if SECRET_KEY.search(str(key)) else redact(value) for key, value in held_out.items()}
    return [redact(value) for value in held_out] if isinstance(held_out, list) else held_out
