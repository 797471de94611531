"""What a command is doing now: the phases that it is in, and the rows of a training run, on stderr.

On a terminal one bar stays in place (`train/terminal_display.py`); elsewhere there are plain lines. `with
phase("tokenizing", total=9) as now: now.done += 1` names what goes on, in whatever file it goes on. In a command
(`show_progress` of cli/output.py) no phase is silent for more than two seconds."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol, TextIO, TypeVar

SILENT_SECONDS = 2.0
"""The longest time without a sign of life; later ones of the same silence come ever more rarely."""
LONGEST_SILENCE, DETAIL_SILENCE = 60.0, 8.0
ItemT = TypeVar("ItemT")


@dataclass
class Phase:
    """A part of a command's work. total: how many steps it has, None where nobody knows. done: of them,
    first: how many at its beginning. is_run: a training run, which has a bar on a terminal. detail: says what goes on
    within it, and then no silence is longer than DETAIL_SILENCE."""

    name: str
    total: int | None = None
    done: int = 0
    is_run: bool = False
    first: int = 0
    began: float = field(default_factory=time.monotonic)
    detail: Callable[[], str] | None = None

    def __str__(self) -> str:
        counted = "" if self.total is None else f" {self.done:,} of {self.total:,}"
        detail = f" ({shown})" if self.detail is not None and (shown := self.detail()) else ""
        return f"{self.name}{counted}, {time.monotonic() - self.began:.0f} s{detail}"


PHASES: list[Phase] = []
"""Those that the main thread is in, the outermost first."""


@contextmanager
def phase(name: str, total: int | None = None, *, done: int = 0, is_run: bool = False) -> Iterator[Phase]:
    """Inside: the command is in this phase."""
    now = Phase(name, total, done, is_run, first=done)
    PHASES.append(now)
    try:
        yield now
    finally:
        PHASES.remove(now)


def track(items: Sequence[ItemT], name: str) -> Iterator[ItemT]:
    """The items, in a phase that counts them."""
    with phase(name, len(items)) as now:
        for item in items:
            yield item
            now.done += 1


def longest_silence() -> float:
    """The longest time without a line in the present phases."""
    return DETAIL_SILENCE if any(one.detail is not None for one in list(PHASES)) else LONGEST_SILENCE


def describe_phases() -> str:
    """The phases as one line."""
    return " · ".join(map(str, list(PHASES))) or "working"


class Logger(Protocol):
    """Shows the progress of a training run."""

    def start(self, step: int, steps: int) -> None:
        """Called before the first step of this process; `step` steps are done."""

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Show a row of metrics."""

    def log_event(self, text: str) -> None:
        """Show an event."""

    def close(self) -> None:
        """Called after the last step, or after an error."""


class NullLogger:
    """Shows nothing (for ranks other than 0, and tests)."""

    def start(self, step: int, steps: int) -> None:
        pass

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        pass

    def log_event(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class LineLogger:
    """One line per event: time, rank, text. unit: what tokens_per_second counts."""

    def __init__(self, rank: int = 0, unit: str = "tokens"):
        self.rank, self.unit = rank, unit
        self.clock = EtaClock(0, 0)

    def start(self, step: int, steps: int) -> None:
        self.clock = EtaClock(step, steps)

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        place = f"step {row['step']}/{self.clock.steps}"
        shown = [*format_metrics(row, self.unit), f"ETA {self.clock.time_left(row['step'])}"]
        self.log_event("  ".join([place, *shown]))
        if scores := format_scores(row):
            self.log_event(f"{place}  held out: {'  '.join(scores)}")

    def log_event(self, text: str) -> None:
        write_line(f"{utc_now()} rank {self.rank} {text}")

    def close(self) -> None:
        pass


class EtaClock:
    """Rate and time left, from how long the steps of this process took, with all that came between them."""

    def __init__(self, step: int, steps: int, start_time: float | None = None):
        self.first_step, self.steps = step, steps
        self.start_time = time.monotonic() if start_time is None else start_time

    def seconds_per_step(self, step: int) -> float:
        return (time.monotonic() - self.start_time) / max(1, step - self.first_step)

    def rate(self, step: int) -> str:
        """Steps per second, or seconds per step where that is more; empty before the first step."""
        if step == self.first_step:
            return ""
        seconds = self.seconds_per_step(step)
        return f"{seconds:.1f} s/step" if seconds > 1 else f"{1 / max(seconds, 1e-9):.1f} step/s"

    def time_left(self, step: int) -> str:
        """The time left as h:mm:ss; -:--:-- before the first step."""
        if step == self.first_step < self.steps:
            return "-:--:--"
        seconds = round(self.seconds_per_step(step) * (self.steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


PROGRESS_METRICS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "reward": ("reward", "{:.3f}".format),
    "completions/mean_length": ("length", "{:.1f}".format),
    "entropy": ("entropy", "{:.3f}".format),
    "kl": ("kl", "{:.4f}".format),
    "frac_reward_zero_std": ("no spread", "{:.0%}".format),
    "completions/clipped_ratio": ("cut off", "{:.0%}".format),
    "loss": ("loss", "{:.4f}".format),
    "next_token": ("next token", "{:.4f}".format),
    "preference_loss": ("of pairs", "{:.4f}".format),
    "accuracy": ("accuracy", "{:.1%}".format),
    "rewards/margin": ("margin", "{:.4f}".format),
    "rewards/accuracy": ("accuracy", "{:.1%}".format),
    "rewards/chosen": ("chosen", "{:.3f}".format),
    "rewards/rejected": ("rejected", "{:.3f}".format),
}
"""Name of a metric -> its label and its form on the progress line, what a method is watched by first."""


def format_metrics(row: Mapping[str, Any], unit: str = "tokens") -> list[str]:
    """What the progress line shows of a row, the most important first. Steps without a target have no loss and no
    rate."""
    known = [(name, label, form) for name, (label, form) in PROGRESS_METRICS.items() if row.get(name) is not None]
    is_empty = not row["tokens_per_second"]
    shown = [f"{label} {form(row[name])}" for name, label, form in known if not (is_empty and math.isnan(row[name]))]
    if not is_empty:
        shown += [f"{row['tokens_per_second']:,.0f} {'tok' if unit == 'tokens' else unit}/s"]
    shown += [f"lr {row['learning_rate']:.2e}"]
    return shown + [f"{name} {row[name]}" for name in ("skipped_steps", "empty_steps") if row.get(name)]


def format_scores(row: Mapping[str, Any]) -> list[str]:
    """What was measured on held-out data, where a row has any of it."""
    scores = {name[5:]: value for name, value in row.items() if name.startswith("eval/") and isinstance(value, float)}
    return [f"{name} {value:.4f}" for name, value in scores.items()]


def utc_now() -> str:
    """The time in UTC, in ISO format."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# -------------------------------------------------------------------------------------------------- where it is shown


def write_line(text: str) -> None:
    """A line on stderr. Control characters (of a folder's name) are question marks; a terminal that is closed, or a
    reader that has gone, ends nothing."""
    shown = "".join(one if one.isprintable() else " " if one.isspace() else "?" for one in text)
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    try:
        sys.stderr.write(shown.encode(encoding, "replace").decode(encoding) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):  # EPIPE, EIO of a terminal that is gone, a closed file
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  open as long as the process
    note_output()


LAST_OUTPUT = [0.0]


def note_output() -> None:
    """Something was shown just now."""
    LAST_OUTPUT[0] = time.monotonic()


def is_terminal(stream: TextIO) -> bool:
    """Whether a bar can stay in place there."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def wants_color(stream: TextIO) -> bool:
    """Colors are for terminals, and for nobody who sets NO_COLOR (no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


class Heartbeat:
    """A line about the current phases whenever nothing was printed for a while."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        shown, patience = LAST_OUTPUT[0], SILENT_SECONDS
        while not self.ended.wait(SILENT_SECONDS / 8):
            if shown != LAST_OUTPUT[0]:
                shown, patience = LAST_OUTPUT[0], SILENT_SECONDS
            if time.monotonic() - shown >= patience - SILENT_SECONDS / 4:
                write_line(f"... {describe_phases()}")
                shown, patience = LAST_OUTPUT[0], min(2 * patience, longest_silence())

    def __enter__(self) -> Heartbeat:
        note_output()
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()
