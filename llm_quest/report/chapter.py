"""What the page says about one run: a sentence, the numbers people look for first, samples, and tables. Plain data;
the template makes it a page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.report.record import Record, Sample
from llm_quest.report.words import duration, quantity, size

SHOWN_SAMPLES = 6
SHOWN_EVENTS = 200
Row = tuple[str, ...]


@dataclass(frozen=True)
class Tile:
    """A number worth large letters."""

    label: str
    value: str
    hint: str = ""


@dataclass(frozen=True)
class Story:
    """All samples of one prompt: some of them, evenly spread over the run, and how many there are."""

    prompt: str
    shown: tuple[Sample, ...]
    rest: tuple[Sample, ...]


@dataclass(frozen=True)
class Chapter:
    """What the page says about one run."""

    name: str
    number: int
    status: str
    good: bool
    sentence: str
    tiles: tuple[Tile, ...]
    stories: tuple[Story, ...]
    data: tuple[Row, ...]
    notes: tuple[str, ...]
    plan: tuple[Row, ...]
    guessed: bool
    events: tuple[Row, ...]
    env: tuple[Row, ...]
    warnings: tuple[str, ...]
    config: str


def chapter(record: Record, number: int) -> Chapter:
    """One run, told."""
    status, good = standing(record)
    ledger = (record.data.get("corpus") or {}).get("ledger") or {}
    found = record.env.get("warnings") or []
    return Chapter(
        name=record.name,
        number=number,
        status=status,
        good=good,
        sentence=sentence(record),
        tiles=tuple(tiles(record)),
        stories=tuple(stories(record)),
        data=tuple(ledger_rows(record)),
        notes=tuple(map(str, ledger.get("notes", ()))),
        plan=tuple(plan_rows(record)),
        guessed=record.plan.get("measured") is False,
        events=tuple(event_rows(record)),
        env=tuple(flat_rows({key: value for key, value in record.env.items() if key != "warnings"})),
        warnings=tuple(": ".join(map(str, one)) if isinstance(one, list) else str(one) for one in found),
        config=record.config,
    )


def standing(record: Record) -> tuple[str, bool]:
    """Where a run stands, and whether that is nothing to worry about."""
    last = str(record.events[-1].get("event", "")) if record.events else ""
    if last == "guard stop":
        return "stopped by a guard", False
    if record.summary.get("step") == record.step and record.summary.get("status"):
        status = str(record.summary["status"])
        return {"time": "time is up"}.get(status, status), status == "finished"
    return ("not finished" if record.rows else "not begun"), False


def sentence(record: Record) -> str:
    """What was run, in plain words, as far as it is known."""
    parameters, page_name = parameters_of(record), record.model.get("page")
    kind = f"A {page_name}-style model" if page_name else "A model"
    told = kind + (f" of {quantity(parameters)} parameters" if parameters else "")
    told += (
        f" was trained for {record.step:,} {'step' if record.step == 1 else 'steps'}"
        if record.rows
        else " waits for its first step"
    )
    if tokens := record.last("tokens"):
        told += f" on {quantity(tokens)} {record.counted}"
    if source := (record.data.get("corpus") or {}).get("name"):
        told += f" of {source}"
    if seconds := record.last("seconds"):
        told += f" in {duration(seconds)}"
    told += "."
    reached, others = reached_bits(record), baselines(record)
    if reached is not None:
        told += f" A byte of held-out text costs it {reached:.3f} bits"
        if others:
            best = min(others, key=lambda name: others[name])
            told += f"; the best baseline ({best}) needs {others[best]:.3f}"
        told += "."
    return told


def parameters_of(record: Record) -> int | None:
    """From whatever says it."""
    found = record.summary.get("parameters") or record.plan.get("parameters")
    return int(found) if isinstance(found, int | float) else None


def reached_bits(record: Record) -> float | None:
    """Held-out bits per byte at the end: of the evaluation if there is one, else the last seen while training."""
    found = record.evaluation.get("bits_per_byte")
    return float(found) if isinstance(found, int | float) else record.last("eval/bits_per_byte")


def baselines(record: Record) -> dict[str, float]:
    """Name -> bits per byte of what counting and compressing reach."""
    found = {**(record.summary.get("baselines") or {}), **(record.evaluation.get("baselines") or {})}
    return {str(name): float(value) for name, value in found.items() if isinstance(value, int | float)}


def tiles(record: Record) -> Iterator[Tile]:
    """The numbers people look for first."""
    reached, others = reached_bits(record), baselines(record)
    if reached is not None:
        interval = record.evaluation.get("interval")
        between = f"95 %: {interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
        yield Tile(
            "held-out bits per byte",
            f"{reached:.3f}",
            f"best baseline {min(others.values()):.3f}" if others else between,
        )
    if (loss := record.last("loss")) is not None:
        held = record.last("eval/loss")
        per = f"nats per {record.counted.removesuffix('s')}"
        yield Tile("training loss", f"{loss:.3f}", f"held-out {held:.3f}" if held is not None else per)
    for name, (_, values) in record.scores.items():
        best = f"largest {max(values):.3f}, of {len(values)}" if len(values) > 1 else ""
        yield Tile(f"held-out {name}", f"{values[-1]:.3f}", best)
    if parameters := parameters_of(record):
        yield Tile("parameters", quantity(parameters), f"{parameters:,}" if parameters >= 1e6 else "")
    if tokens := record.last("tokens"):
        ratio = f"{tokens / parameters:.3g} per parameter" if parameters else ""
        yield Tile(f"{record.counted} read", quantity(tokens), ratio)
    if speed := median_speed(record):
        yield Tile(f"{record.counted} per second", f"{speed:,.0f}", "median over the run")
    if seconds := record.last("seconds"):
        yield Tile("time in steps", duration(seconds), f"{record.step:,} steps")
    resumed = sum(event.get("event") == "resumed" for event in record.events)
    if resumed:
        yield Tile("resumed", f"{resumed}", "going on where it stood")
    if skipped := record.last("skipped"):
        yield Tile("skipped updates", f"{skipped:,.0f}", "not finite, left out")


def median_speed(record: Record) -> float | None:
    """Tokens per second of the middle row; the first, which warms up, is left out where there are others."""
    values = [value for value in record.series("tokens_per_second")[1] if math.isfinite(value) and value > 0]
    return statistics.median(values[1:] or values) if values else None


def stories(record: Record) -> Iterator[Story]:
    """Per prompt, what the model made of it as it learned."""
    for prompt in dict.fromkeys(sample.prompt for sample in record.samples):
        told = [sample for sample in record.samples if sample.prompt == prompt]
        step = (len(told) - 1) / max(1, SHOWN_SAMPLES - 1)
        chosen = (
            sorted({round(place * step) for place in range(SHOWN_SAMPLES)})
            if len(told) > SHOWN_SAMPLES
            else range(len(told))
        )
        rest = tuple(one for i, one in enumerate(told) if i not in chosen)
        yield Story(prompt, tuple(told[i] for i in chosen), rest)


def ledger_rows(record: Record) -> Iterator[Row]:
    """(what, documents, bytes, tokens)"""
    for key, name in (("train", "trained on"), ("val", "held out")):
        if f"{key}_bytes" in record.data:
            yield name, *(counted(record.data.get(f"{key}_{what}")) for what in ("documents", "bytes", "tokens"))
        if f"{key}_images" in record.data:
            yield name, f"{counted(record.data[f'{key}_images'])} images", "", ""
    ledger = (record.data.get("corpus") or {}).get("ledger") or {}
    if kept := ledger.get("kept"):
        yield "kept of the source", counted(kept.get("documents")), counted(kept.get("bytes")), ""
    for reason, dropped in (ledger.get("dropped") or {}).items():
        yield f"dropped: {reason}", counted(dropped.get("documents")), counted(dropped.get("bytes")), ""


def counted(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def plan_rows(record: Record) -> Iterator[Row]:
    """(what, foreseen, measured, measured / foreseen)"""
    plan, speed = record.plan, median_speed(record)
    per_step = plan.get("tokens_per_step")
    measured = {
        "tokens_per_second": speed,
        "step_seconds": per_step / speed if per_step and speed else None,
        "seconds": record.last("seconds"),
        "tokens": record.last("tokens"),
        "memory_total": record.summary.get("peak_memory_bytes"),
        "checkpoint_bytes": max(record.checkpoints.values(), default=None),
        "disk_bytes": sum(record.checkpoints.values()) or None,
        "parameters": record.summary.get("parameters"),
    }
    for key, (name, told) in PLANNED.items():
        foreseen, found = plan.get(key), measured[key]
        if isinstance(foreseen, int | float):
            ratio = f"{found / foreseen:.3g}" if found and foreseen else ""
            yield name, told(foreseen), told(found) if found else "not recorded", ratio
    for kind, held in (plan.get("memory") or {}).items():
        yield f"memory: {kind}", size(held), "", ""


PLANNED: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", lambda value: f"{value:,}"),
    "tokens_per_second": ("tokens per second", lambda value: f"{value:,.0f}"),
    "step_seconds": ("a step", duration),
    "seconds": ("time in steps", duration),
    "tokens": ("tokens", quantity),
    "checkpoint_bytes": ("a checkpoint", size),
    "disk_bytes": ("checkpoints on disk", size),
    "memory_total": ("memory", size),
}


def event_rows(record: Record) -> Iterator[Row]:
    """(time, what, details), the newest SHOWN_EVENTS."""
    if len(record.events) > SHOWN_EVENTS:
        yield "", f"{len(record.events) - SHOWN_EVENTS:,} earlier events are in events.jsonl", ""
    for event in record.events[-SHOWN_EVENTS:]:
        details = {key: value for key, value in event.items() if key not in ("time", "event", "message")}
        told = ", ".join(
            f"{key} {Path(value).name if key == 'checkpoint' else value}" for key, value in details.items()
        )
        message = str(event.get("message", ""))
        yield (
            str(event.get("time", ""))[:19].replace("T", " "),
            str(event.get("event", "")),
            " · ".join(filter(None, (message, told))),
        )


def flat_rows(held: Mapping[str, Any], above: str = "") -> Iterator[Row]:
    """(key, value), with dots between the levels."""
    for key, value in held.items():
        if isinstance(value, dict) and value:
            yield from flat_rows(value, f"{above}{key}.")
        else:
            told = ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
            yield f"{above}{key}", told
