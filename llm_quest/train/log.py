"""What is seen while training: a progress bar on a terminal, one line per event elsewhere; TensorBoard if asked for.

Displays write to stderr. tokens/s counts the time of steps alone: evaluation, samples and checkpoints are not in it;
the time left (ETA) counts everything."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from llm_quest.errors import MissingError
from llm_quest.train.run import now


class Display(Protocol):
    """Shows a run to somebody."""

    def start(self, step: int, steps: int) -> None:
        """Before the first step of this process; `step` steps are done."""

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics."""

    def event(self, text: str) -> None:
        """Something worth a line."""

    def close(self) -> None:
        """After the last step, or when something went wrong."""


class Silent:
    """Shows nothing (the other ranks, tests)."""

    def start(self, step: int, steps: int) -> None:
        pass

    def row(self, row: Mapping[str, Any]) -> None:
        pass

    def event(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """One line per event: time, rank, what."""

    def __init__(self, rank: int = 0):
        self.rank = rank
        self.clock = Clock(0, 0)

    def start(self, step: int, steps: int) -> None:
        self.clock = Clock(step, steps)

    def row(self, row: Mapping[str, Any]) -> None:
        self.event(f"step {row['step']}/{self.clock.steps}  {brief(row)}  ETA {self.clock.left(row['step'])}")

    def event(self, text: str) -> None:
        sys.stderr.write(f"{now()} rank {self.rank} {text}\n")
        sys.stderr.flush()

    def close(self) -> None:
        pass


class Bar:
    """A rich progress bar."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.clock = Clock(0, 0)

    def start(self, step: int, steps: int) -> None:
        self.clock = Clock(step, steps)
        self.task = self.progress.add_task("", total=steps, completed=step)
        self.progress.start()

    def row(self, row: Mapping[str, Any]) -> None:
        text = f"{brief(row)}  ETA {self.clock.left(row['step'])}"
        self.progress.update(self.task, completed=row["step"], description=text)

    def event(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.progress.stop()


class Board:
    """TensorBoard beside another display: every number of a row as a scalar under the run folder."""

    def __init__(self, folder: Path, beside: Display):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingError(
                "TensorBoard is not installed; pip install 'llm-quest[tensorboard]', or leave it out"
            ) from error
        self.make = SummaryWriter
        self.folder = folder
        self.beside = beside
        self.writer: Any = None

    def start(self, step: int, steps: int) -> None:
        self.writer = self.make(str(self.folder), purge_step=step + 1)
        self.beside.start(step, steps)

    def row(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, row["step"])
        self.beside.row(row)

    def event(self, text: str) -> None:
        self.beside.event(text)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.beside.close()


class Clock:
    """How long is left, going by how long the steps of this process took, with all that came between them."""

    def __init__(self, step: int, steps: int):
        self.first, self.steps, self.since = step, steps, time.monotonic()

    def left(self, step: int) -> str:
        """h:mm:ss."""
        per_step = (time.monotonic() - self.since) / max(1, step - self.first)
        seconds = round(per_step * (self.steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def display(rank: int = 0, *, quiet: bool = False) -> Display:
    """The display that suits where stderr goes; nothing for the other ranks."""
    if quiet or rank:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines(rank)


def brief(row: Mapping[str, Any]) -> str:
    """A row in one line: the loss, the rate of tokens, what probes found, what was skipped."""
    parts = [f"loss {row['loss']:.4f}", f"{row['tokens_per_second']:,.0f} tok/s", f"lr {row['lr']:.2e}"]
    parts += [f"{name} {value:.4f}" for name, value in row.items() if "/" in name and isinstance(value, float)]
    parts += [f"{name} {row[name]}" for name in ("skipped", "empty") if row.get(name)]
    return "  ".join(parts)
