"""The ledger: appended, merged, cut, edited, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_quest.cli.ledger import export_ledger_rows, list_experiments, merge_into_ledger, show_experiment
from llm_quest.errors import UsageError
from llm_quest.experiments.comparison import Claim, Comparison
from llm_quest.experiments.ledger import Ledger, find_faults, read_rows


def fill(file: Path, name: str, effect: float = -0.1, **claim: str) -> Ledger:
    """An experiment of five pairs. claim: further fields of its claim."""
    ledger = Ledger(file)
    comparison = Comparison(Claim("eval/loss", 0.03, 12, greater_is_better=False, normal=True), ["arm"])
    arms = {"control": {}, "arm": {}}
    ledger.append(
        "claim",
        name,
        {"question": f"Is {name} true?", "recipe": "tiny", "arms": arms, "command": "quest ablate tiny"} | claim,
    )
    for seed in range(1, 6):
        run = {"run": f"{name}{seed}", "arm": "arm", "seed": seed, "role": "report"}
        ledger.append("started", name, run)
        ledger.append(
            "run", name, {**run, "status": "finished", "metrics": {"eval/loss": 1.5}, "cpu_seconds": 2.0, "steps": 9}
        )
        if comparison.open_arms:
            comparison.add_pair(seed, 1.6, {"arm": 1.6 + effect + 0.001 * (seed % 3)})
    ledger.append("verdict", name, comparison.verdict("arm"))
    return ledger


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return fill(tmp_path / "ledger.jsonl", "one").file


def test_rows_name_the_row_before_them(file: Path):
    rows = Ledger(file).of("one")
    assert [row["kind"] for row in rows] == ["claim", *["started", "run"] * 5, "verdict"]
    assert rows[0]["parent"] == ""
    assert [row["parent"] for row in rows[1:]] == [row["id"] for row in rows[:-1]]
    assert find_faults(rows) == []


def test_the_same_row_is_written_once(file: Path):
    before = file.read_bytes()
    Ledger(file).append("claim", "one", {"question": "Is one true?"})
    assert file.read_bytes() == before
    first = Ledger(file).append("claim", "one", {"question": "Once?", "command": "quest ablate"})
    assert Ledger(file).append("claim", "one", {"question": "Once?", "command": "quest ablate --jobs 1"}) == first


def test_an_edited_row_and_a_missing_one_are_found(file: Path):
    lines = file.read_text().splitlines()
    edited = [line.replace('"better"', '"worse"') for line in lines]
    file.write_text("\n".join(edited) + "\n")
    assert "was edited" in find_faults(read_rows(file, print))[0]
    file.write_text("\n".join(lines[:3] + lines[4:]) + "\n")
    (fault,) = find_faults(read_rows(file, print))
    assert "lacks the row before" in fault


def test_a_cut_last_row_is_named_and_skipped_and_the_next_stands_behind_it(file: Path):
    file.write_bytes(file.read_bytes()[:-30])
    said: list[str] = []
    rows = read_rows(file, said.append)
    assert len(rows) == 11
    assert said[0].startswith(f"{file}:12: not a whole row")
    Ledger(file).append("verdict", "one", {"arm": "arm", "outcome": "better"})
    rows = read_rows(file, said.append)
    assert [row["kind"] for row in rows][-1] == "verdict"
    assert find_faults(rows) == []


def test_ledgers_merge_in_any_order_to_the_same_set(tmp_path: Path):
    one, two = fill(tmp_path / "1.jsonl", "one").file, fill(tmp_path / "2.jsonl", "two").file
    assert merge_into_ledger([one, two], tmp_path / "a.jsonl", print).content["added"] == 24
    merge_into_ledger([two], tmp_path / "b.jsonl", print)
    merge_into_ledger([one, two], tmp_path / "b.jsonl", print)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert merge_into_ledger([one], tmp_path / "a.jsonl", print).content["added"] == 0
    rows = read_rows(tmp_path / "a.jsonl", print)
    assert find_faults(rows) == []
    places = {row["id"]: place for place, row in enumerate(rows)}
    assert all(places[row["parent"]] < place for place, row in enumerate(rows) if row["parent"])
    with pytest.raises(UsageError, match="no such ledger"):
        merge_into_ledger([tmp_path / "nowhere.jsonl"], tmp_path / "a.jsonl", print)


def test_experiments_are_listed_and_shown(file: Path):
    fill(file, "two", effect=0.0)
    text = "\n".join(list_experiments(file, print).lines())
    assert "Is one true?" in text
    assert "arm: better, by at least 0.03" in text
    assert "arm: no difference larger than 0.03" in text
    shown = show_experiment(file, "tw", print).lines()
    assert shown[0] == "Is two true?"
    assert any("seed 5" in line and "eval/loss 1.5" in line for line in shown)
    with pytest.raises(UsageError, match=r"0 experiments of .* are called three; the newest are: one, two"):
        show_experiment(file, "three", print)
    nothing = list_experiments(file.with_name("none.jsonl"), print)
    assert nothing.as_json() == []
    assert "no ledger yet" in nothing.lines()[0]
    with pytest.raises(UsageError, match="no ledger yet"):
        show_experiment(file.with_name("none.jsonl"), "one", print)


def test_a_confirmation_is_shown_with_its_verdict_where_the_question_was_asked_first(file: Path):
    row = {"sentence": "asked once more on the test half: two", "by": "two"}
    Ledger(file).append("confirmation", "one", row)
    assert list_experiments(file, print).lines()[-1].strip() == row["sentence"], "it has no verdict yet"
    fill(file, "two", effect=0.0, confirms="one")
    for shown in (list_experiments(file, print).lines(), show_experiment(file, "one", print).lines()):
        assert any(f"{row['sentence']} (arm: no difference larger than 0.03)" in line for line in shown)
    assert any("Is two true? (once more; first in one)" in line for line in list_experiments(file, print).lines())


def test_an_experiment_is_shown_with_the_settings_of_its_arms_and_the_rates_of_its_runs(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    derived = {"control": {"warmup_steps": {"recipe": 50, "value": 6, "why": "shortened with max_steps"}}}
    resolved = {"control": {"max_steps": 120, "warmup_steps": 6}, "none": {"warmup_steps": 0}}
    ledger.append("claim", "one", {"recipe": "pretrain", "resolved": resolved, "derived": derived})
    run = {"run": "a", "arm": "none", "seed": 101, "role": "tune", "settings": ["batch_size=8", "learning_rate=0.004"]}
    ledger.append("run", "one", {**run, "status": "finished", "metrics": {}, "cpu_seconds": 2.0})
    shown = show_experiment(ledger.file, "one", print).lines()
    assert "settings of control: max_steps=120 warmup_steps=6" in shown
    assert "settings of none: warmup_steps=0" in shown
    assert any("warmup_steps is 6, not pretrain's 50 (shortened with max_steps)" in line for line in shown)
    assert any("seed 101  learning_rate 0.004  finished" in line for line in shown)


def test_every_run_that_is_shown_has_a_line_of_its_own(tmp_path: Path):
    """Two A/A pairs, whose runs have one arm and few seeds: the line says what differs, before what was measured."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("claim", "one", {"recipe": "tiny"})
    own = ["batch_size=6"]
    runs = [("a", 301, own), ("b", 302, own), ("c", 301, own), ("d", 301, [*own, "micro_batch_size=2"])]
    ended = {"arm": "control", "role": "aa", "status": "finished", "metrics": {}, "cpu_seconds": 2.0}
    for name, seed, pairs in runs:
        ledger.append("run", "one", {**ended, "run": name, "seed": seed, "settings": pairs})
    ledger.append("run", "one", {**ended, "run": "e", "seed": 1, "role": "report", "settings": own})
    shown = [line for line in show_experiment(ledger.file, "one", print).lines() if "finished" in line]
    assert len(shown) == len(set(shown)) == 5
    for line, words in zip(shown, ("seed 301  f", "seed 302  f", "seed 301  identical rerun  f",
                                   "seed 301  micro_batch_size=2  f", "seed 1  f"), strict=True):  # fmt: skip
        assert words in line


def test_verdicts_are_exported_as_a_table_and_runs_to_a_tracker(file: Path, tmp_path: Path):
    assert export_ledger_rows(file, "csv", None, print).content["verdicts"] == 1
    head, row = file.with_suffix(".csv").read_text().splitlines()
    assert dict(zip(head.split(","), row.split(","), strict=False))["outcome"] == "better"
    assert export_ledger_rows(file, "tensorboard", tmp_path / "board", print).content["runs"] == 5
    assert len(list((tmp_path / "board").rglob("events.out*"))) == 5
    with pytest.raises(UsageError, match="known are csv, tensorboard, wandb, trackio"):
        export_ledger_rows(file, "excel", None, print)


def test_a_verdict_is_json_that_any_reader_takes(file: Path):
    for line in file.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
