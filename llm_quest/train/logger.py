"""Loggers of a training run: a progress bar on a terminal, one line per event elsewhere; TensorBoard on request.

They write to stderr. tokens/s counts the time of steps alone, without evaluation, samples and checkpoints; the time
left (ETA) counts everything."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from llm_quest.errors import MissingError
from llm_quest.train.run_dir import utc_now


class Logger(Protocol):
    """Shows the progress of a run."""

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
    """One line per event: time, rank, text."""

    def __init__(self, rank: int = 0):
        self.rank = rank
        self.clock = EtaClock(0, 0)

    def start(self, step: int, steps: int) -> None:
        self.clock = EtaClock(step, steps)

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        self.log_event(
            f"step {row['step']}/{self.clock.steps}  {format_metrics(row)}  ETA {self.clock.time_left(row['step'])}"
        )

    def log_event(self, text: str) -> None:
        sys.stderr.write(f"{utc_now()} rank {self.rank} {text}\n")
        sys.stderr.flush()

    def close(self) -> None:
        pass


class ProgressBarLogger:
    """A progress bar by rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.clock = EtaClock(0, 0)

    def start(self, step: int, steps: int) -> None:
        self.clock = EtaClock(step, steps)
        self.task = self.progress.add_task("", total=steps, completed=step)
        self.progress.start()

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        text = f"{format_metrics(row)}  ETA {self.clock.time_left(row['step'])}"
        self.progress.update(self.task, completed=row["step"], description=text)

    def log_event(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.progress.stop()


class TensorBoardLogger:
    """TensorBoard in addition to another logger: every number of a row is a scalar in the run folder."""

    def __init__(self, folder: Path, inner: Logger):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingError(
                "TensorBoard is not installed; pip install 'llm-quest[tensorboard]', or leave it out"
            ) from error
        self.writer_class = SummaryWriter
        self.folder = folder
        self.inner = inner
        self.writer: Any = None

    def start(self, step: int, steps: int) -> None:
        self.writer = self.writer_class(str(self.folder), purge_step=step + 1)
        self.inner.start(step, steps)

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, row["step"])
        self.inner.log_metrics(row)

    def log_event(self, text: str) -> None:
        self.inner.log_event(text)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.inner.close()


class EtaClock:
    """The time left, from how long the steps of this process took, with all that came between them."""

    def __init__(self, step: int, steps: int):
        self.first_step, self.steps, self.start_time = step, steps, time.monotonic()

    def time_left(self, step: int) -> str:
        """As h:mm:ss."""
        per_step = (time.monotonic() - self.start_time) / max(1, step - self.first_step)
        seconds = round(per_step * (self.steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def make_logger(rank: int = 0, *, quiet: bool = False) -> Logger:
    """The logger that suits where stderr goes; none for ranks other than 0."""
    if quiet or rank:
        return NullLogger()
    return ProgressBarLogger() if sys.stderr.isatty() else LineLogger(rank)


def format_metrics(row: Mapping[str, Any]) -> str:
    """A row in one line: the loss, tokens per second, results of evaluations, skipped steps."""
    parts = [f"loss {row['loss']:.4f}", f"{row['tokens_per_second']:,.0f} tok/s", f"lr {row['learning_rate']:.2e}"]
    parts += [f"{name} {value:.4f}" for name, value in row.items() if "/" in name and isinstance(value, float)]
    parts += [f"{name} {row[name]}" for name in ("skipped_steps", "empty_steps") if row.get(name)]
    return "  ".join(parts)
