"""The frame of papers: statistics by hand, a verdict that can go three ways, measurements that survive a kill."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from llm_quest.cli.papers import cards_dir, list_papers
from llm_quest.errors import UsageError
from llm_quest.papers import PAPERS, load_paper
from llm_quest.papers.card import VERDICTS, outcome_of_card, recorded_verdict, results_table, write_card
from llm_quest.papers.lab import steps_to_reach
from llm_quest.papers.paper import ExperimentResults, MeanInterval, Measurement, mean_interval, verdict_from_interval
from llm_quest.papers.reproduce import load_results, save_results


def results(**arms: list[float]) -> ExperimentResults:
    found = ExperimentResults()
    for arm, values in arms.items():
        for seed, value in enumerate(values, 1):
            found.add(arm, seed, Measurement({"loss": value}, [(0.0, value), (1.0, value / 2)]))
    return found


def test_the_interval_is_students() -> None:
    three = mean_interval([1.0, 2.0, 3.0])
    assert three.mean == 2.0
    assert three.half_width == pytest.approx(4.303 * 1.0 / math.sqrt(3), abs=1e-3)
    assert mean_interval([5.0]) == MeanInterval(5.0, math.inf)
    assert str(MeanInterval(0.5, 0.012)) == "0.5 ± 0.012"


def test_differences_are_paired_by_seed() -> None:
    found = results(arm=[1.1, 5.1, 9.1], control=[1.0, 5.0, 9.0])
    assert found.difference("arm", "control", "loss").mean == pytest.approx(0.1)
    assert found.difference("arm", "control", "loss").half_width < 1e-9
    assert found.interval("arm", "loss").half_width > 5


@pytest.mark.parametrize(
    ("effect", "outcome"),
    [
        (MeanInterval(-1, 0.5), "confirmed"), (MeanInterval(1, 0.5), "refuted"),
        (MeanInterval(-1, 2), "no effect seen"),
        (MeanInterval(-1, math.inf), "no effect seen"),
    ],
)  # fmt: skip
def test_a_verdict_can_go_three_ways(effect: MeanInterval, outcome: str) -> None:
    assert verdict_from_interval(effect, "", wanted="negative").outcome == outcome


def test_steps_to_a_level() -> None:
    curve = [(float(step), 10.0 - step) for step in range(10)]
    assert steps_to_reach(curve, 5.0, window=1) == 5.0
    assert steps_to_reach(curve, 5.0, window=3) == 6.0
    assert steps_to_reach(curve, -1.0) == 9.0


@pytest.mark.parametrize("name", PAPERS)
def test_every_paper_says_what_it_claims_and_judges_by_its_own_numbers(name: str) -> None:
    found = load_paper(name)
    assert found.name == name
    assert all((found.title, found.arxiv, found.claim, found.experiment, found.confirms, found.refutes))
    assert len(found.arms) >= 2
    assert found.minutes <= 60


def test_measurements_are_kept_and_those_of_other_code_are_not(tmp_path: Path) -> None:
    chosen, found = load_paper("muon"), results(AdamW=[4.0], Muon=[3.9])
    found.add("AdamW", 2, Measurement({"loss": math.inf}, [(1.0, math.nan)]))
    save_results(tmp_path / "muon.json", chosen, found)
    again = load_results(tmp_path / "muon.json", chosen)
    assert again.arms["AdamW"][1] == found.arms["AdamW"][1]
    assert again.arms["AdamW"][2].numbers == {"loss": math.inf}
    assert math.isnan(again.arms["AdamW"][2].curve[0][1])
    content = json.loads((tmp_path / "muon.json").read_text())
    (tmp_path / "muon.json").write_text(json.dumps(content | {"code": "another"}))
    assert load_results(tmp_path / "muon.json", chosen).arms == {}


def test_the_card_holds_the_verdict_the_picture_and_the_table(tmp_path: Path) -> None:
    found = results(AdamW=[4.0, 4.1, 4.2], Muon=[3.9, 4.0, 4.1])
    chosen = replace(
        load_paper("muon"),
        verdict=lambda r: verdict_from_interval(r.difference("Muon", "AdamW", "loss"), "by a tenth", wanted="negative"),
    )
    card = write_card(chosen, found, tmp_path)
    assert write_card(chosen, found, tmp_path).file == card.file, "a card is outcome_of_card again by the same command"
    page = card.file.read_text()
    assert "## Verdict: confirmed" in page
    assert "by a tenth" in page
    assert "![training loss against step](muon.svg)" in page
    assert (tmp_path / "muon.svg").read_text().lstrip().startswith("<?xml")
    assert recorded_verdict(tmp_path, "muon") == "confirmed"
    assert outcome_of_card(tmp_path, "yarn") == ""
    assert results_table(found)[2].startswith("| AdamW | 4.1 ± 0.25 |")


def test_a_paper_that_is_not_there_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'muon'"):
        load_paper("moun")


def test_the_packages_outcomes_are_those_of_the_cards_and_are_found_anywhere(tmp_path, monkeypatch):
    docs = Path(__file__).parents[2] / "docs" / "papers"
    shipped = json.loads(VERDICTS.read_text(encoding="utf-8"))
    assert shipped == {name: found for name in PAPERS if (found := outcome_of_card(docs, name))}
    monkeypatch.chdir(tmp_path)
    found = {entry.name: entry.verdict for entry in list_papers().entries}
    assert found == {name: shipped.get(name, "") for name in PAPERS}
    assert found["muon"] == "confirmed"


def test_an_outcome_outcome_of_card_here_comes_before_the_packages(tmp_path):
    (tmp_path / "muon.md").write_text("## Verdict: no effect seen\n")
    assert recorded_verdict(tmp_path, "muon") == "no effect seen"


def test_cards_have_one_place_whatever_the_working_directory(tmp_path, monkeypatch):
    """In a checkout it is docs/papers; an installed package keeps them in the user's cache."""
    monkeypatch.chdir(tmp_path)
    assert cards_dir() == Path(__file__).parents[2] / "docs" / "papers"
    monkeypatch.setattr("llm_quest.cli.papers.CHECKOUT_CARDS", tmp_path / "nowhere")
    monkeypatch.setenv("LLM_QUEST_CACHE", str(tmp_path / "cache"))
    assert cards_dir() == tmp_path / "cache" / "papers"
    cards_dir().mkdir(parents=True)
    (cards_dir() / "muon.md").write_text("## Verdict: no effect seen\n")
    monkeypatch.chdir("/")
    assert {entry.name: entry.verdict for entry in list_papers().entries}["muon"] == "no effect seen"
