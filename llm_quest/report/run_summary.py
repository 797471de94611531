"""The contents of the report on one run: a sentence, the main numbers, samples, and tables. Plain data, which the
template turns into HTML."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.formatting import format_bytes, format_duration, format_quantity
from llm_quest.report.classifier_tables import confusion_rows, format_count, label_rows
from llm_quest.report.metric_families import LOSS_TERMS, WATCHED, loss_unit, main_loss_metric
from llm_quest.report.record import RunRecord, SampleRow, TableRow

MAX_SAMPLES_SHOWN = 6
MAX_EVENTS_SHOWN = 200


@dataclass(frozen=True)
class KeyFigure:
    """A main number, shown in large type."""

    label: str
    value: str
    hint: str = ""


@dataclass(frozen=True)
class SampleHistory:
    """All samples of one prompt: some of them, evenly spread over the run, and how many there are."""

    prompt: str
    shown: tuple[SampleRow, ...]
    rest: tuple[SampleRow, ...]


@dataclass(frozen=True)
class RunSummary:
    """The contents of the report on one run."""

    name: str
    number: int
    status: str
    good: bool
    sentence: str
    tiles: tuple[KeyFigure, ...]
    stories: tuple[SampleHistory, ...]
    data: tuple[TableRow, ...]
    notes: tuple[str, ...]
    labels: tuple[TableRow, ...]
    confusion: tuple[TableRow, ...]
    plan: tuple[TableRow, ...]
    guessed: bool
    events: tuple[TableRow, ...]
    env: tuple[TableRow, ...]
    warnings: tuple[str, ...]
    config: str


def summarize_run(record: RunRecord, number: int) -> RunSummary:
    """Summarize one run."""
    status, good = run_status(record)
    drop_report = drop_report_of(record)
    warnings = record.env.get("warnings") or []
    return RunSummary(
        name=record.name,
        number=number,
        status=status,
        good=good,
        sentence=summary_sentence(record),
        tiles=tuple(key_figures(record)),
        stories=tuple(sample_histories(record)),
        data=tuple(data_rows(record)),
        notes=tuple(map(str, [*drop_report.get("notes", ()), *row_notes(record)])),
        labels=tuple(label_rows(record)),
        confusion=tuple(confusion_rows(record)),
        plan=tuple(plan_rows(record)),
        guessed=record.plan.get("measured") is False,
        events=tuple(event_rows(record)),
        env=tuple(flatten_rows({key: value for key, value in record.env.items() if key != "warnings"})),
        warnings=tuple(
            ": ".join(map(str, warning)) if isinstance(warning, list) else str(warning) for warning in warnings
        ),
        config=record.config,
    )


def run_status(record: RunRecord) -> tuple[str, bool]:
    """The status of a run, and whether it is a good one."""
    last = str(record.events[-1].get("event", "")) if record.events else ""
    if last == "stopped_by_guard":
        return "stopped by a guard", False
    if record.summary.get("step") == record.step and record.summary.get("status"):
        status = str(record.summary["status"])
        return {"time": "time is up"}.get(status, status), status == "finished"
    return ("not finished" if record.rows else "not begun"), False


def summary_sentence(record: RunRecord) -> str:
    """What was run, in one sentence, as far as it is known."""
    parameters, page_name = parameters_of(record), record.model.get("family") or record.model.get("page")
    kind = f"A {page_name}-style model" if page_name else "A model"
    text = kind + (f" of {format_quantity(parameters)} parameters" if parameters else "")
    text += (
        f" was trained for {record.step:,} {'step' if record.step == 1 else 'steps'}"
        if record.rows
        else " waits for its first step"
    )
    if tokens := record.last("tokens"):
        text += f" on {format_quantity(tokens)} {record.unit}"
    if source := (record.data.get("corpus") or {}).get("name"):
        text += f" of {source}"
    if seconds := record.last("train_seconds"):
        text += f" in {format_duration(seconds)}"
    text += "."
    reached, others = final_bits_per_byte(record), recorded_baselines(record)
    if reached is not None:
        text += f" A byte of held-out text costs it {reached:.3f} bits"
        if others:
            best = min(others, key=lambda name: others[name])
            text += f"; the best baseline ({best}) needs {others[best]:.3f}"
        text += "."
    return text


def parameters_of(record: RunRecord) -> int | None:
    """The number of parameters, from the summary or the plan."""
    number = record.summary.get("parameters") or record.plan.get("parameters")
    return int(number) if isinstance(number, int | float) else None


def final_bits_per_byte(record: RunRecord) -> float | None:
    """Held-out bits per byte at the end: of the evaluation if there is one, else the last one of the training run."""
    bits_per_byte = record.evaluation.get("bits_per_byte")
    return float(bits_per_byte) if isinstance(bits_per_byte, int | float) else record.last("eval/bits_per_byte")


def recorded_baselines(record: RunRecord) -> dict[str, float]:
    """Name -> bits per byte of the n-gram and compression baselines."""
    baselines = {**(record.summary.get("baselines") or {}), **(record.evaluation.get("baselines") or {})}
    return {str(name): float(value) for name, value in baselines.items() if isinstance(value, int | float)}


def key_figures(record: RunRecord) -> Iterator[KeyFigure]:
    """The main numbers."""
    reached, others = final_bits_per_byte(record), recorded_baselines(record)
    if reached is not None:
        interval = record.evaluation.get("interval")
        between = f"95 %: {interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
        yield KeyFigure(
            "held-out bits per byte",
            f"{reached:.3f}",
            f"best baseline {min(others.values()):.3f}" if others else between,
        )
    yield from loss_figures(record)
    for metric, label, form in WATCHED:
        if (value := record.last(metric)) is not None:
            yield KeyFigure(label, form.format(value), "at the end")
    yield from score_figures(record)
    if parameters := parameters_of(record):
        yield KeyFigure("parameters", format_quantity(parameters), f"{parameters:,}" if parameters >= 1e6 else "")
    if tokens := record.last("tokens"):
        ratio = f"{tokens / parameters:.3g} per parameter" if parameters else ""
        yield KeyFigure(f"{record.unit} read", format_quantity(tokens), ratio)
    if speed := median_speed(record):
        yield KeyFigure(f"{record.unit} per second", f"{speed:,.0f}", "median over the run")
    if seconds := record.last("train_seconds"):
        yield KeyFigure("time in steps", format_duration(seconds), f"{record.step:,} steps")
    if memory := record.summary.get("peak_memory_bytes"):
        yield KeyFigure("most memory", format_bytes(memory), "of the main process")
    resumed = sum(event.get("event") == "resumed" for event in record.events)
    if resumed:
        yield KeyFigure("resumed", f"{resumed}", "going on where it stood")
    if skipped := record.last("skipped_steps"):
        yield KeyFigure("skipped updates", f"{skipped:,.0f}", "not finite, left out")


def loss_figures(record: RunRecord) -> Iterator[KeyFigure]:
    """The main loss, and where other terms are added to it, the sum that is optimized and each of them by its name."""
    main, unit = main_loss_metric(record), loss_unit(record)
    if (loss := record.last(main)) is None:
        return
    held_out_loss = record.last("eval/loss")
    label = "policy loss" if "reward" in record.rows[-1] else "training loss"
    yield KeyFigure(
        label, f"{loss:.3f}", f"held-out {held_out_loss:.3f}, {unit}" if held_out_loss is not None else unit
    )
    terms = [(name, value) for metric, name in LOSS_TERMS if (value := record.last(metric)) is not None]
    if terms and main != "loss":
        yield KeyFigure("optimized sum", f"{record.last('loss'):.3f}", "the loss with the terms below")
    yield from (KeyFigure(f"term: {name}", f"{value:.4f}", "before its weight") for name, value in terms)


def score_figures(record: RunRecord) -> Iterator[KeyFigure]:
    """Held-out scores: the last, what it was before the first step, and the best."""
    for name, (steps, values) in record.scores.items():
        before = f"{values[0]:.3f} before" if steps[0] == 0 and len(values) > 1 else ""
        best = f"largest {max(values):.3f}, of {len(values)}" if len(values) > 1 else ""
        yield KeyFigure(f"held-out {name}", f"{values[-1]:.3f}", ", ".join(filter(None, (before, best))))


def median_speed(record: RunRecord) -> float | None:
    """Tokens per second of the middle row; the first, which warms up, is left out where there are others."""
    values = [value for value in record.series("tokens_per_second")[1] if math.isfinite(value) and value > 0]
    return statistics.median(values[1:] or values) if values else None


def sample_histories(record: RunRecord) -> Iterator[SampleHistory]:
    """The samples of each prompt, in the order of the steps."""
    for prompt in dict.fromkeys(sample.prompt for sample in record.samples):
        samples = [sample for sample in record.samples if sample.prompt == prompt]
        step = (len(samples) - 1) / max(1, MAX_SAMPLES_SHOWN - 1)
        chosen = (
            sorted({round(place * step) for place in range(MAX_SAMPLES_SHOWN)})
            if len(samples) > MAX_SAMPLES_SHOWN
            else range(len(samples))
        )
        rest = tuple(sample for i, sample in enumerate(samples) if i not in chosen)
        yield SampleHistory(prompt, tuple(samples[i] for i in chosen), rest)


def drop_report_of(record: RunRecord) -> dict[str, Any]:
    """The report of what was kept and dropped; runs of the first version call it ledger."""
    corpus = record.data.get("corpus") or {}
    return corpus.get("drop_report") or corpus.get("ledger") or {}


def data_rows(record: RunRecord) -> Iterator[TableRow]:
    """(what, documents, bytes, tokens)"""
    for key, name in (("train", "trained on"), ("val", "held out")):
        if f"{key}_bytes" in record.data:
            yield name, *(format_count(record.data.get(f"{key}_{what}")) for what in ("documents", "bytes", "tokens"))
        if f"{key}_images" in record.data:
            yield name, f"{format_count(record.data[f'{key}_images'])} images", "", ""
        if f"{ROW_KEYS[key]}_rows" in record.data:
            yield name, f"{format_count(record.data[f'{ROW_KEYS[key]}_rows'])} rows", "", ""
    for reason, count in (record.data.get("dropped") or {}).items():
        yield f"not used: {reason}", f"{format_count(count)} rows", "", ""
    drop_report = drop_report_of(record)
    if kept := drop_report.get("kept"):
        yield "kept of the source", format_count(kept.get("documents")), format_count(kept.get("bytes")), ""
    for reason, dropped in (drop_report.get("dropped") or {}).items():
        yield f"dropped: {reason}", format_count(dropped.get("documents")), format_count(dropped.get("bytes")), ""
    rows = drop_report or record.data
    for kind, count in (rows.get("skipped") or {}).get("kinds", {}).items():
        yield f"cannot be used: {kind}", f"{format_count(count)} rows", "", ""
    for key, count in (rows.get("unused_keys") or {}).items():
        yield f"key that nothing reads: {key}", f"{format_count(count)} rows", "", ""


ROW_KEYS = {"train": "train", "val": "held_out"}
"""Part of the data -> its name in the facts about rows."""


def row_notes(record: RunRecord) -> list[str]:
    """What was noted about the rows."""
    notes = record.data.get("notes") or []
    return [str(note) for note in notes] if isinstance(notes, list) else []


def plan_rows(record: RunRecord) -> Iterator[TableRow]:
    """Rows of (quantity, predicted, measured, measured / predicted)."""
    plan, speed = record.plan, median_speed(record)
    per_step = plan.get("tokens_per_step")
    measured = {
        "tokens_per_second": speed,
        "step_seconds": per_step / speed if per_step and speed else None,
        "seconds": record.last("train_seconds"),
        "tokens": record.last("tokens"),
        "memory_total": record.summary.get("peak_memory_bytes"),
        "checkpoint_bytes": max(record.checkpoints.values(), default=None),
        "disk_bytes": sum(record.checkpoints.values()) or None,
        "parameters": record.summary.get("parameters"),
    }
    for key, (name, format_value) in PLAN_ROWS.items():
        predicted, actual = plan.get(key), measured[key]
        if isinstance(predicted, int | float):
            ratio = f"{actual / predicted:.3g}" if actual and predicted else ""
            yield name, format_value(predicted), format_value(actual) if actual else "not recorded", ratio
    for kind, num_bytes in (plan.get("memory") or {}).items():
        yield f"memory: {kind}", format_bytes(num_bytes), "", ""


PLAN_ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", lambda value: f"{value:,}"),
    "tokens_per_second": ("tokens per second", lambda value: f"{value:,.0f}"),
    "step_seconds": ("a step", format_duration),
    "seconds": ("time in steps", format_duration),
    "tokens": ("tokens", format_quantity),
    "checkpoint_bytes": ("a checkpoint", format_bytes),
    "disk_bytes": ("checkpoints on disk", format_bytes),
    "memory_total": ("memory", format_bytes),
}


def event_rows(record: RunRecord) -> Iterator[TableRow]:
    """(time, what, details), the newest SHOWN_EVENTS."""
    if len(record.events) > MAX_EVENTS_SHOWN:
        yield "", f"{len(record.events) - MAX_EVENTS_SHOWN:,} earlier events are in events.jsonl", ""
    for event in record.events[-MAX_EVENTS_SHOWN:]:
        details = {key: value for key, value in event.items() if key not in ("time", "event", "message")}
        extra = ", ".join(
            f"{key} {Path(value).name if key == 'checkpoint' else value}" for key, value in details.items()
        )
        message = str(event.get("message", ""))
        yield (
            str(event.get("time", ""))[:19].replace("T", " "),
            str(event.get("event", "")),
            " · ".join(filter(None, (message, extra))),
        )


def flatten_rows(held_out: Mapping[str, Any], above: str = "") -> Iterator[TableRow]:
    """(key, value), with dots between the levels."""
    for key, value in held_out.items():
        if isinstance(value, dict) and value:
            yield from flatten_rows(value, f"{above}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
            yield f"{above}{key}", text
