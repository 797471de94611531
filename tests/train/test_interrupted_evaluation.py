"""An evaluation that a signal ends is made up by the resumed run: nothing of the straight run's numbers is missing."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llm_quest.train.run_dir import RunDir
from llm_quest.train.state import PendingRow, Progress
from tests.faults.kills import run_result
from tests.train.small import Rule, go

STEPS = 6


class Evaluation:
    """Measures a number that first falls and then rises. At its calls in `told` SIGTERM comes, and it goes on for a
    minute. interval 0: at the end alone."""

    def __init__(self, name: str = "eval", interval: int = 2, told: Sequence[int] = ()):
        self.name, self.interval, self.told, self.calls = name, interval, told, 0

    def evaluate(self, model: Any, step: int) -> dict[str, float]:
        self.calls += 1
        if self.calls in self.told:
            os.kill(os.getpid(), signal.SIGTERM)
            limit = time.monotonic() + 60
            while time.monotonic() < limit:
                time.sleep(0.005)
        return {"loss": abs(step - 2.5), "weight": float(model.embed.weight.sum())}


class ToldInStep(Rule):
    """SIGTERM comes in a step at whose end an evaluation is due: the step is finished, the evaluation not begun."""

    def __init__(self, told: Sequence[int] = ()):
        super().__init__()
        self.told = told

    def batches(self, step: int) -> Any:
        if step + 1 in self.told:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batches(step)


LAST = Evaluation("at the end", interval=0)
BEST = {"metric_for_best_model": "eval/loss", "save_steps": 1, "save_total_limit": 0}
STOP = BEST | {"early_stopping_patience": 1}
RUNS: dict[str, tuple[Sequence[dict[str, Any]], dict[str, Any]]] = {
    "in the middle and again": ([{"told": [1]}, {"told": [1]}, {"told": [3]}], {}),
    "at the end and again": ([{"told": [3]}, {"told": [1]}], {}),
    "at the end of early stopping": ([{"told": [3]}], STOP),
    "before early stopping is known": ([{"told": [2]}], STOP),
    "of the best model": ([{"told": [4]}], BEST | {"load_best_model_at_end": True}),
}
"""Where signals come: the calls of each run, until the last one, which goes to its end; and settings."""


def train(folder: Path, told: Sequence[int] = (), in_steps: Sequence[int] = (), **settings: Any) -> Any:
    with RunDir(folder) as run:
        probes = [Evaluation(told=told), LAST]
        return go(STEPS, run, feed=ToldInStep(in_steps), probes=probes, **settings)


def rows_of(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(folder: Path) -> Any:
    """What the run ends with; its rows of metrics, one for each step, have all evaluations."""
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert all("eval/loss" in row for row in rows[1::2])
    return run_result(folder), (folder / "checkpoints/BEST").exists()


@pytest.mark.parametrize("name", RUNS)
def test_an_evaluation_that_a_signal_ends_is_made_up(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llm_quest.train.signals.PATIENCE_SECONDS", 0.05)
    stops, settings = RUNS[name]
    straight = train(tmp_path / "straight", **settings)
    for stop in stops:
        stopped = train(tmp_path / "run", **stop, **settings)
        assert (stopped.status, stopped.exit_code) == ("interrupted", 143)
    resumed = train(tmp_path / "run", **settings)
    assert (resumed.status, resumed.step) == (straight.status, straight.step) == ("finished", straight.step)
    assert results(tmp_path / "run") == results(tmp_path / "straight")
    assert resumed.metrics.keys() == straight.metrics.keys()
    again = train(tmp_path / "run", **settings)
    assert again.status == "finished"
    assert results(tmp_path / "run") == results(tmp_path / "straight")


class PowerCut(ToldInStep):
    def batches(self, step: int) -> Any:
        if step == 2:
            raise RuntimeError("no power")
        return super().batches(step)


def test_a_row_that_was_made_up_stands_once_although_the_run_is_killed_behind_it(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("llm_quest.train.signals.PATIENCE_SECONDS", 0.05)
    train(tmp_path / "straight")
    train(tmp_path / "run", told=[1])
    with RunDir(tmp_path / "run") as run, pytest.raises(RuntimeError, match="no power"):
        go(STEPS, run, feed=PowerCut(), probes=[Evaluation(), LAST])
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    train(tmp_path / "run")
    assert results(tmp_path / "run") == results(tmp_path / "straight")


@pytest.mark.parametrize("step", [4, STEPS])
def test_an_evaluation_that_is_due_after_a_signal_is_made_up(step: int, tmp_path: Path):
    """At the last step it is made at once, if it is short, and what comes after the loop is left."""
    train(tmp_path / "straight")
    stopped = train(tmp_path / "run", in_steps=[step])
    assert (stopped.status, stopped.step, stopped.exit_code) == ("interrupted", step, 143)
    train(tmp_path / "run")
    assert results(tmp_path / "run") == results(tmp_path / "straight")


def test_a_run_that_was_stopped_in_its_last_evaluation_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With more steps: the row of its former end has what that end measures."""
    monkeypatch.setattr("llm_quest.train.signals.PATIENCE_SECONDS", 0.05)
    train(tmp_path / "run", told=[3])
    with RunDir(tmp_path / "run") as run:
        assert go(STEPS + 2, run, feed=ToldInStep(), probes=[Evaluation(), LAST]).status == "finished"
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 3))
    assert [row["step"] for row in rows if "at the end/loss" in row] == [STEPS, STEPS + 2]


ROW = dict.fromkeys(PendingRow.COUNTERS, 1) | {"loss": 0.5}


@pytest.mark.parametrize(
    "wrong",
    [{"loss": "x"}, {"loss": None}, {"loss": [1]}, {"step": {}}, {"train/x": "1e3"}],
    ids=lambda one: str(*one.items()),
)
def test_a_row_that_waits_for_its_evaluations_holds_numbers_alone(wrong: dict[str, Any]):
    """What a stranger's checkpoint says of it is not taken."""
    assert Progress(pending={"row": ROW, "is_last": True}).pending == PendingRow(ROW, is_last=True)  # type: ignore[arg-type]
    for row in (ROW | wrong, {name: value for name, value in ROW.items() if name != "tokens"}):
        with pytest.raises(TypeError, match="a row of metrics lacks a number"):
            Progress(pending={"row": row, "is_last": True})  # type: ignore[arg-type]
