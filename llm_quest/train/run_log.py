"""RunLog: the events and rows of metrics of a run, to the display, to the trackers and to the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_quest.progress import Logger
from llm_quest.train.run_dir import RunDir


class RunLog:
    """Logs events and metrics from the main process; the other processes log nothing."""

    def __init__(self, run_dir: RunDir | None, logger: Logger, is_main_process: bool):
        self.run_dir, self.logger, self.is_main_process = run_dir, logger, is_main_process

    def event(self, name: str, **fields: Any) -> None:
        """Log an event: a saved checkpoint, a skipped step, advice."""
        if self.is_main_process:
            self.logger.log_event(
                f"{name}: " + "  ".join(str(v) if k == "message" else f"{k} {v}" for k, v in fields.items())
            )
            if self.run_dir is not None:
                self.run_dir.log_event(name, **fields)

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Log a row of metrics."""
        if self.is_main_process:
            self.logger.log_metrics(row)
            if self.run_dir is not None:
                self.run_dir.log_metrics(row)

    def write_crash_report(self, report: Mapping[str, Any]) -> str:
        """Log that a guard stopped the run, and write crash.json. Returns " (its path)", empty without a folder."""
        where = f" ({self.run_dir.write_crash_report(report)})" if self.run_dir is not None else ""
        self.event("stopped_by_guard", **report)
        return where
