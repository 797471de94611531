"""Experiment trackers beside the run folder: TensorBoard, Weights & Biases and Trackio, by `report_to`.

A tracker that fails while the run goes on is left out from then on, with one warning: it never ends a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llm_quest.errors import import_extra, install_command
from llm_quest.progress import Logger

PROJECT, LEAVE_OUT = "llm-quest", ", or take it out of report_to"


class Tracker(Protocol):
    """A tracker to which the numbers of a run are sent."""

    def start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        """Called before the first step; `step` steps are done."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def tracker_run_id(folder: Path) -> str:
    """The id of a run at its tracker: the same when it is resumed, another for a folder of that name elsewhere."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


class TensorBoard:
    """Scalars in the run's folder `tensorboard`."""

    def __init__(self) -> None:
        import_extra("tensorboard", install_command("tensorboard") + LEAVE_OUT)
        self.module = import_extra("torch.utils.tensorboard", install_command("tensorboard") + LEAVE_OUT)

    def start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self.writer = self.module.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, the same one when the run is resumed; WANDB_MODE and WANDB_PROJECT apply."""

    def __init__(self) -> None:
        self.module = import_extra("wandb", install_command("wandb") + LEAVE_OUT)

    def start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self.run = self.module.init(
            project=None if "WANDB_PROJECT" in os.environ else PROJECT, name=folder.name, id=tracker_run_id(folder),
            dir=str(folder), config=dict(config), resume="allow",
        )  # fmt: skip

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of Trackio, which keeps its numbers on this machine. Runs of one name are one run there, so that the name
    has a part of the id."""

    def __init__(self) -> None:
        self.module = import_extra("trackio", install_command("trackio") + LEAVE_OUT)

    def start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        name = f"{folder.name}-{tracker_run_id(folder)[:8]}"
        self.module.init(project=PROJECT, name=name, config=dict(config), resume="allow")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.module.log(dict(numbers), step=step)

    def close(self) -> None:
        self.module.finish()


TRACKERS: dict[str, Callable[[], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
"""Name in `report_to` -> the tracker."""


class TrackedLogger:
    """A logger that also sends every number of a row to trackers."""

    def __init__(self, inner: Logger, trackers: Sequence[str], folder: Path, config: Mapping[str, Any]):
        self.inner, self.folder, self.config = inner, folder, config
        self.trackers = {name: TRACKERS[name]() for name in dict.fromkeys(trackers)}

    def start(self, step: int, steps: int) -> None:
        self.inner.start(step, steps)
        self._each(lambda tracker: tracker.start(self.folder, self.config, step))

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        self._each(lambda tracker: tracker.log(numbers, row["step"]))
        self.inner.log_metrics(row)

    def log_event(self, text: str) -> None:
        self.inner.log_event(text)

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self.inner.close()

    def _each(self, action: Callable[[Tracker], None]) -> None:
        """Call `action` with every tracker; one that fails is left out from now on."""
        for name, tracker in list(self.trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # whatever the tracker's code raises
                del self.trackers[name]
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                self.inner.log_event(f"warning: {name} gets no more numbers of this run ({reason})")
