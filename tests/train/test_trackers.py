"""Trackers get every number of a run; one that fails is left out with a warning and never ends the run."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from llm_quest.errors import MissingError
from llm_quest.progress import NullLogger
from llm_quest.train.trackers import TRACKERS, TrackedLogger
from tests.recipes.every_recipe import prepare, run_tiny
from tests.train.small import go


class Events(NullLogger):
    """Keeps the events."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def log_event(self, text: str) -> None:
        self.texts.append(text)


class Recorder(types.ModuleType):
    """Stands for wandb and for trackio, as far as they are called."""

    def __init__(self, name: str, fails_at: int = -1):
        super().__init__(name)
        self.options: dict[str, Any] = {}
        self.rows: dict[int, dict[str, float]] = {}
        self.fails_at, self.finished = fails_at, False

    def init(self, **options: Any) -> Recorder:
        self.options = options
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("no route to the server\nsecond line")
        self.rows[step] = numbers

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_number_of_every_row(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recorder = Recorder(name)
    monkeypatch.setitem(sys.modules, name, recorder)
    go(3, show=TrackedLogger(NullLogger(), [name], tmp_path, {"seed": 0}))
    assert list(recorder.rows) == [1, 2, 3]
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second"} <= recorder.rows[3].keys()
    assert recorder.options["config"] == {"seed": 0}
    assert "step" not in recorder.rows[3], "Trackio keeps this name for itself, and renames ours with a warning"
    assert recorder.options["resume"] == "allow"
    assert recorder.options["name"].startswith(tmp_path.name)
    assert recorder.finished


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_runs_of_one_name_in_two_places_are_two_runs_and_a_resumed_run_is_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Trackio knows a run by its name alone, W&B by its id."""
    recorder, seen = Recorder(name), []
    monkeypatch.setitem(sys.modules, name, recorder)
    for folder in (tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "a" / "run"):
        TrackedLogger(NullLogger(), [name], folder, {}).start(0, 1)
        seen.append((recorder.options["name"], recorder.options.get("id")))
    assert seen[0] == seen[2] != seen[1]


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken, fine, shown = Recorder("wandb", fails_at=2), Recorder("trackio"), Events()
    monkeypatch.setitem(sys.modules, "wandb", broken)
    monkeypatch.setitem(sys.modules, "trackio", fine)
    result = go(4, show=TrackedLogger(shown, ["wandb", "trackio"], tmp_path, {}))
    assert result.status == "finished"
    assert (list(broken.rows), list(fine.rows)) == ([1], [1, 2, 3, 4])
    assert [text for text in shown.texts if text.startswith("warning")] == [
        "warning: wandb gets no more numbers of this run (no route to the server)"
    ]


@pytest.mark.parametrize("name", TRACKERS)
def test_an_absent_package_is_told_before_the_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(MissingError, match=f"pip install 'llm-quest\\[{name}\\]', or take it out of report_to"):
        TrackedLogger(NullLogger(), [name], tmp_path, {})


@pytest.mark.parametrize("pair", ["tensorboard=true", "report_to=[tensorboard]"])
def test_tensorboard_is_written_by_either_key(pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("LLM_QUEST_CACHE", str(tmp_path / "cache"))
    prepare(tmp_path)
    run_tiny("sft", tmp_path, tmp_path / "run", pair)
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.*"))
