"""`quest eval RUN` for every recipe: its own held-out measure, the numbers that the run printed at its end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from book.reference import unexplained_metrics, unknown_files
from llm_quest.errors import DataError, UsageError
from llm_quest.recipes.held_out import evaluate_run
from tests.recipes.every_recipe import NAMES, make_every_run, run_tiny
from tests.shared_folder import shared_folder


def quiet(line: str) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory, "runs", make_every_run)


def files_of(run: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file()}


def test_the_reference_explains_every_number_and_names_every_file_of_every_recipes_run(folder: Path, tmp_path: Path):
    runs = [folder / "alone" / recipe for recipe in NAMES]
    assert {run.name: found for run in runs if (found := unexplained_metrics(run))} == {}
    assert {run.name: found for run in runs if (found := unknown_files(run))} == {}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/mystery.bin").touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "mystery": 2.0}\n')
    assert unknown_files(tmp_path) == ["checkpoints/mystery.bin"]
    assert unexplained_metrics(tmp_path) == ["mystery"]


@pytest.mark.parametrize("recipe", NAMES)
def test_eval_measures_what_the_run_printed_and_writes_nothing(
    recipe: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LLM_QUEST_CACHE", str(folder / "cache"))
    run = folder / "alone" / recipe
    before = files_of(run)
    found = evaluate_run(str(run), log=quiet)
    summary = json.loads(max(run.rglob("summary.json")).read_text())
    printed = {name: value for name, value in summary["scores"].items() if value is not None}
    assert printed
    assert {name: found.scores[name] for name in printed} == printed
    assert found.step == summary["step"]
    assert f"step {found.step}" in found.lines()[0]
    assert json.loads(json.dumps(found.as_json()))["scores"].keys() == found.scores.keys()
    assert files_of(run) == before
    assert set(found.intervals) == ({"bits_per_byte"} if recipe == "pretrain" else set())
    assert all(low < found.scores[name] < high for name, (low, high) in found.intervals.items())


def test_a_checkpoint_is_measured_as_the_run_measured_it_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LLM_QUEST_CACHE", str(folder / "cache"))
    run_tiny("sft", folder, tmp_path / "each step", "eval_steps=1")
    rows = [json.loads(line) for line in (tmp_path / "each step" / "metrics.jsonl").read_text().splitlines()]
    found = evaluate_run(str(tmp_path / "each step" / "checkpoints" / "step-00000001"), log=quiet)
    assert (found.step, found.scores["loss"]) == (1, rows[0]["eval/loss"])
    assert found.scores["loss"] != rows[1]["eval/loss"]


def test_a_run_whose_data_changed_is_not_measured_on_other_data(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LLM_QUEST_CACHE", str(folder / "cache"))
    run = tmp_path / "moved"
    shutil.copytree(folder / "alone" / "sft", run)
    rows = (folder / "pairs.jsonl").read_text().splitlines()[:-8]
    (tmp_path / "fewer.jsonl").write_text("\n".join(rows) + "\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["source"] = str(tmp_path / "fewer.jsonl")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(DataError, match="another data than there is now"):
        evaluate_run(str(run), log=quiet)


def test_a_run_that_held_nothing_out_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLM_QUEST_CACHE", str(folder / "cache"))
    run_tiny("sft", folder, tmp_path / "all of it", "data.held_out=0")
    with pytest.raises(UsageError, match="held nothing out"):
        evaluate_run(str(tmp_path / "all of it"), log=quiet)


def test_what_is_no_run_is_asked_for_a_text(folder: Path):
    with pytest.raises(UsageError, match="--data FILE"):
        evaluate_run(str(folder / "base"), log=quiet)
