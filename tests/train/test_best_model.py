"""The best checkpoint of a run by a metric, early stopping, and the name that each checkpoint of a run has."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from llm_quest.errors import DataError
from llm_quest.hub.locate import is_checkpoint, resolve_checkpoint, run_of_checkpoint, usable_checkpoint
from llm_quest.train.best_model import BestModel, is_greater_better
from llm_quest.train.run_dir import RunDir
from llm_quest.train.state import Progress
from tests.train.small import Losses, go, objective


class Curve:
    """Measures `values[step]` at every second step, and counts how often it is asked."""

    name, interval = "eval", 2

    def __init__(self, values: dict[int, float], metric: str = "loss"):
        self.values, self.metric, self.steps = values, metric, []

    def evaluate(self, model, step):
        self.steps.append(step)
        return {self.metric: self.values.get(step, 9.0)}


VALLEY = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 10: 4.0}
BEST = {"metric_for_best_model": "eval/loss"}


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def test_the_best_model_is_saved_though_no_checkpoint_is_due(tmp_path):
    with RunDir(tmp_path / "run") as run:
        go(10, run, save_steps=0, save_total_limit=1, probes=[Curve(VALLEY)], **BEST)
    assert steps_of(tmp_path / "run") == [4, 10]


def test_a_run_ends_when_its_metric_gets_no_better(tmp_path):
    """The best is at step 4; the second measurement after it is at step 8."""
    show, curve = Losses(), Curve(VALLEY)
    with RunDir(tmp_path / "run") as run:
        result = go(40, run, probes=[curve], show=show, early_stopping_patience=2, **BEST)
    assert (result.step, result.status) == (8, "finished")
    assert any("eval/loss has not become better for 2 measurements; the best was 1 at step 4" in e for e in show.events)
    assert steps_of(tmp_path / "run") == [2, 4, 8][-2:]
    again = Losses()
    with RunDir(tmp_path / "run") as run:  # the same command again, or a longer run, trains no further and says why
        assert go(40, run, probes=[curve], show=again, early_stopping_patience=2, **BEST).step == 8
        assert any("at step 4; it goes on with a larger early_stopping_patience" in event for event in again.events)
        assert go(40, run, probes=[curve], early_stopping_patience=3, **BEST).step == 10


def test_early_stopping_survives_an_interruption(tmp_path):
    with RunDir(tmp_path / "run") as run:
        go(6, run, probes=[Curve(VALLEY)], early_stopping_patience=2, **BEST)
    with RunDir(tmp_path / "run") as run:
        assert go(40, run, probes=[Curve(VALLEY)], early_stopping_patience=2, **BEST).step == 8


def test_the_best_weights_are_loaded_at_the_end(tmp_path):
    """They are those of its checkpoint, the evaluation after the end is of them, and the run's name stands for them
    until the run is trained on."""
    model = objective()
    run_dir = tmp_path / "run"
    with RunDir(run_dir) as run:
        go(10, run, made=model, probes=[Curve(VALLEY)], load_best_model_at_end=True, **BEST)
    from safetensors.torch import load_file

    saved = load_file(run_dir / "checkpoints/step-00000004/model.safetensors")
    own = dict(model.model.named_parameters())
    assert saved
    assert all((own[name] == value).all() for name, value in saved.items() if name in own)
    assert usable_checkpoint(run_dir).name == "step-00000004"
    with RunDir(run_dir) as run:
        result = go(12, run, probes=[Curve(VALLEY)], **BEST)
    assert result.step == 12
    assert usable_checkpoint(run_dir).name == "step-00000012"


def test_a_metric_of_training_counts_where_it_is_logged(tmp_path):
    with RunDir(tmp_path / "run") as run:
        result = go(6, run, metric_for_best_model="loss")
    state = json.loads((Path(result.checkpoint_path) / "state.json").read_text())["progress"]
    assert state["best_name"] == "loss"
    assert state["best_step"] in range(1, 7)


@pytest.mark.parametrize(
    ("name", "greater"),
    [("eval/loss", False), ("eval/perplexity", False), ("eval/bits_per_byte", False), ("eval/calibration_error", False),
     ("kl", False), ("eval/accuracy", True), ("reward", True), ("rewards/margins", True)],
)  # fmt: skip
def test_which_way_is_better_follows_from_the_name(name, greater):
    assert is_greater_better(name) is greater


def test_another_metric_begins_anew_and_nan_is_never_the_best():
    progress = Progress(step=3, best_name="eval/loss", best_metric=0.1, best_step=2, measurements_since_best=1)
    assert BestModel("eval/accuracy").update(progress, {"eval/accuracy": 0.2})
    assert (progress.best_name, progress.best_metric, progress.best_step) == ("eval/accuracy", 0.2, 3)
    assert not BestModel("eval/accuracy").update(progress, {"eval/accuracy": math.nan})
    assert progress.measurements_since_best == 1
    assert not BestModel("eval/accuracy").update(progress, {"loss": 1.0})
    assert progress.measurements_since_best == 1


def test_every_checkpoint_of_a_run_has_a_name(tmp_path):
    run_dir = tmp_path / "run"
    with RunDir(run_dir) as run:
        go(10, run, probes=[Curve(VALLEY)], save_total_limit=0, **BEST)
    name = str(run_dir)
    assert resolve_checkpoint(f"{name}@best").name == "step-00000004"
    assert resolve_checkpoint(f"{name}@last").name == "step-00000010"
    assert resolve_checkpoint(f"{name}@2").name == "step-00000002"
    assert resolve_checkpoint(name) == run_dir
    with pytest.raises(DataError, match=r"has no checkpoint 7; there are .*run@2, .*run@4, .*run@10"):
        resolve_checkpoint(f"{name}@7")
    with pytest.raises(DataError, match="has no checkpoint bets"):
        resolve_checkpoint(f"{name}@bets")
    shutil.copytree(run_dir, tmp_path / "run@best")
    assert resolve_checkpoint(f"{name}@best") == tmp_path / "run@best"  # a folder of that name comes first


def test_a_checkpoint_is_known_by_its_place_also_as_the_working_folder(tmp_path, monkeypatch):
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    checkpoint.mkdir(parents=True)
    monkeypatch.chdir(checkpoint)
    assert (is_checkpoint(Path()), run_of_checkpoint(Path())) == (True, tmp_path / "run")
    assert (is_checkpoint(tmp_path / "run"), run_of_checkpoint(tmp_path / "run")) == (False, tmp_path / "run")


def test_a_run_without_a_best_checkpoint_says_how_to_get_one(tmp_path):
    with RunDir(tmp_path / "run") as run:
        go(2, run)
    with pytest.raises(DataError, match="no best checkpoint: train it with metric_for_best_model=eval/loss"):
        resolve_checkpoint(f"{tmp_path / 'run'}@best")
