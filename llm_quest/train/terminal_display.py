"""Progress on a terminal: the bar of a run with step, rate and time left stays in place, below it the newest numbers
and the phase inside the run; what is printed meanwhile, evaluations among it, scrolls by above."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, ClassVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llm_quest.progress import LAST_OUTPUT, PHASES, EtaClock, Phase, format_metrics, format_scores, note_output

LONGEST_BAR = 40
PATIENCE = 1.0
"""Seconds after which the phase inside a run is named."""


class TerminalDisplay:
    """The one live area of stderr. `active`: the display that is open. metrics: the newest numbers of the run."""

    active: ClassVar[TerminalDisplay | None] = None

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.metrics: list[str] = []
        self.live = Live(
            get_renderable=self.render, console=self.console, transient=True, redirect_stdout=False,
            refresh_per_second=4, vertical_overflow="crop",
        )  # fmt: skip

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[TerminalDisplay]:
        """Open the display, or join the one that is open, until the context ends."""
        if cls.active is not None:
            yield cls.active
            return
        cls.active = display = cls()
        try:
            with suppress(OSError, ValueError):  # of a terminal that is gone, here and below
                display.live.start()
            yield display
        finally:
            with suppress(OSError, ValueError):
                display.live.stop()
            cls.active = None

    def render(self) -> RenderableType:
        """The content of the live area."""
        phases, width = list(PHASES), self.console.width
        runs = [phase for phase in phases if phase.is_run]
        lines: list[RenderableType] = [self.run_line(run, width) for run in runs[-1:]]
        if runs and self.metrics:
            lines.append(single_line("  ".join(items_that_fit(self.metrics, width))))
        inner = [phase for phase in phases if not phase.is_run]
        if inner and (not runs or time.monotonic() - inner[-1].began > PATIENCE):
            lines.append(single_line(" · ".join(map(str, inner))))
        if not phases and time.monotonic() - LAST_OUTPUT[0] > PATIENCE:
            lines.append(single_line("working"))
        return Group(*lines)

    def run_line(self, run: Phase, width: int) -> RenderableType:
        """Step, bar, rate, time left: as wide as the terminal or less."""
        assert run.total is not None, "a run knows its steps"
        clock = EtaClock(run.first, run.total, run.began)
        before = f"{'step' if run.name == 'training' else run.name} {run.done}/{run.total}"
        after = f"{clock.rate(run.done)}  ETA {clock.time_left(run.done)}".strip()
        room = min(LONGEST_BAR, width - len(before) - len(after) - 4)
        bar = ProgressBar(total=max(run.total, 1), completed=run.done, width=max(room, 1))
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(Text(before, no_wrap=True), *([bar] if room > 3 else []), Text(after, no_wrap=True))
        return line

    def print_line(self, text: str) -> None:
        """A line above the live area, wrapped where it is longer than the terminal is wide."""
        with suppress(OSError, ValueError):
            self.live.refresh()  # or else what stood there a moment ago is drawn again below the line
            self.console.print(text, markup=False, highlight=False)
        note_output()


def single_line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def items_that_fit(items: Sequence[str], width: int) -> list[str]:
    """The items that fit on one line, with two spaces between them."""
    shown: list[str] = []
    for item in items:
        if len("  ".join([*shown, item])) <= width:
            shown.append(item)
    return shown


class BarLogger:
    """The logger of a training run on a terminal. unit: what tokens_per_second counts."""

    def __init__(self, unit: str = "tokens"):
        self.unit = unit
        self.context: AbstractContextManager[TerminalDisplay] = TerminalDisplay.open()

    def start(self, step: int, steps: int) -> None:
        self.display, self.steps = self.context.__enter__(), steps

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        self.display.metrics = format_metrics(row, self.unit)
        if scores := format_scores(row):
            self.display.print_line(f"step {row['step']}/{self.steps}  held out: {'  '.join(scores)}")

    def log_event(self, text: str) -> None:
        if TerminalDisplay.active is not None:
            TerminalDisplay.active.print_line(text)
        else:
            Console(stderr=True).print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.display.metrics = []
        self.context.__exit__(None, None, None)
