"""Claims as rows: every one is a plan whose arms differ; verdicts; cards; what `quest papers` shows."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llm_quest.cli import papers as commands
from llm_quest.data import generated_text
from llm_quest.data.problems import TASKS
from llm_quest.errors import UsageError
from llm_quest.experiments.arms import resolve_settings
from llm_quest.experiments.comparison import Comparison
from llm_quest.experiments.worker import run_arm
from llm_quest.papers import PAPERS, Paper, load_paper
from llm_quest.papers.card import describe_trend, draw_differences, load_card, shipped_verdicts, write_card
from llm_quest.papers.paper import CONFIRMS, judge
from llm_quest.papers.reproduce import SizeResult, comparison_claim, describe_cost, make_paper_plan, shorten_result
from llm_quest.recipes.model_config import build_model_config
from llm_quest.recipes.recipe import get_recipe, load_recipe
from tests.papers import directions
from tests.papers.made_up import make_result

DOCS = Path(__file__).parents[2] / "docs" / "papers"
OWN_VALUE = r"null: (the model's own|[\d.]+ if)"
"""In the description of a key that a model has a value for."""


def test_there_are_forty_claims_and_each_says_what_it_expects():
    assert len(PAPERS) >= 40
    for paper in map(load_paper, PAPERS):
        assert all((paper.title, paper.arxiv, paper.claim)), paper.name
        assert paper.expect in CONFIRMS
        assert 0 < paper.prediction < 1
        assert set(paper.all_sizes) <= set(paper.bench_spec.sizes)


def check_model(recipe: str, pairs: list[str]) -> None:
    """The model of an arm that builds one is one that the family takes."""
    _, config, settings = load_recipe(recipe, pairs)
    if config.model.family is not None or config.model.preset is not None:
        build_model_config(config.model, settings, vocab=512, context=128)


def sizes_of(name: str) -> list[str]:
    sizes = load_paper(name).all_sizes
    return sorted({sizes[0], sizes[-1]})


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in PAPERS for size in sizes_of(name)])
def test_every_claim_is_a_plan_at_its_smallest_and_largest_size(name: str, size: str):
    """Settings that the recipe takes, arms that differ from the control, bases that settings name, a cost."""
    paper = load_paper(name)
    lines: list[str] = []
    plan = make_paper_plan(paper, size, lines.append)
    assert [arm.name for arm in plan.arms] == list(paper.arms), lines
    for arm in (plan.control, *plan.arms):
        check_model(plan.recipe, [*plan.pairs, *arm.pairs])
    named = " ".join(
        [*plan.pairs, *(p for arm in plan.arms for p in arm.pairs), *(p for b in plan.bases for p in b.pairs)]
    )
    for base in plan.bases:
        resolve_settings(base.recipe, base.pairs)
        assert f"<{base.name}>" in named
    assert "$" not in named
    cost = describe_cost(paper, size)
    assert (" that they begin from; about " if plan.bases else " runs; about ") in cost


def test_arms_have_equal_budgets_unless_learning_rates_are_what_differs():
    """An arm sets no length of its own, and rates are tuned for all arms or for none."""
    for paper in map(load_paper, PAPERS):
        for pairs in paper.arms.values():
            keys = {pair.partition("=")[0] for pair in paper.fill_in(pairs, paper.all_sizes[0])}
            assert not keys & {"max_steps", "seed", "num_train_epochs", "eval_tokens", "data.source"}, paper.name
            assert paper.rates == 1 or "learning_rate" not in keys, paper.name


@pytest.mark.parametrize("name", PAPERS)
def test_a_control_sets_what_null_would_leave_to_the_model_where_an_arm_sets_it(name: str):
    """Otherwise the control has a weaker form of what the arm is about: DeepSeek-V3's routers have a bias."""
    paper = load_paper(name)
    size = paper.all_sizes[0]
    control = {pair.partition("=")[0] for pair in paper.fill_in([*paper.bench_spec.settings, *paper.settings], size)}
    keys = {pair.partition("=")[0] for arm in paper.arms.values() for pair in paper.fill_in(arm, size)}
    fields = get_recipe(paper.bench_spec.recipe).Config.model_fields
    own = {key for key in keys if key in fields and re.search(OWN_VALUE, fields[key].description or "")}
    assert own <= control


def test_a_size_that_a_claim_does_not_have_is_told():
    with pytest.raises(UsageError, match=r"lora has no size 9M; it has 0\.3M, 1M"):
        make_paper_plan(load_paper("lora"), "9M", lambda text: None)


def test_a_paper_that_is_not_there_is_told_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'muon'"):
        load_paper("moun")


def test_the_hash_follows_what_is_measured_and_not_the_words():
    paper = load_paper("muon")
    assert replace(paper, claim="Other words.", replication="").hash == paper.hash
    longer = [*paper.settings, "batch_size=4"]
    for edit in ({"delta": 0.06}, {"cap": 20}, {"settings": longer}, {"expect": "worse"}, {"scale": "log"}):
        assert replace(paper, **edit).hash != paper.hash
    countdown = load_paper("countdown")
    costly = {name: {**base, "seconds": {"0.1M": 1e4}} for name, base in countdown.bases.items()}
    assert replace(countdown, bases=costly).hash == countdown.hash, "what a base costs is no part of it"
    assert describe_cost(replace(countdown, bases=costly), "0.1M").endswith(
        "; about 16 h 41 min to 38 h 57 min of one core"
    )


@pytest.mark.parametrize(
    ("expect", "outcome", "verdict"),
    [
        ("better", "better", "confirmed"),
        ("better", "no difference larger than delta", "refuted"),
        ("better", "worse", "refuted"),
        ("not worse", "not worse by delta", "confirmed"),
        ("not worse", "worse by more than delta", "refuted"),
        ("not worse", "worse", "refuted"),
        ("no difference", "no difference larger than delta", "confirmed"),
        ("no difference", "better by more than delta", "refuted"),
        ("worse", "worse", "confirmed"),
        ("better", "undecided (cap)", "undecided"),
        ("better", "undecided (time)", "undecided"),
        ("better", "invalid", "invalid"),
    ],
)
def test_verdicts(expect: str, outcome: str, verdict: str):
    assert judge(expect, outcome) == verdict


def test_a_card_holds_verdict_tuning_interval_size_date_machine_and_replication(tmp_path: Path):
    paper = load_paper("muon")
    result = make_result(paper, "better", [-0.5, -0.51, -0.49, -0.5])
    result["verdicts"][0]["secondary"] = {"max_violation": {"mean": -0.8, "interval_95": [-1.0, -0.6]}}
    card = write_card(paper, {"0.3M": result}, tmp_path)
    page = card.file.read_text()
    for part in (
        "## Verdict: confirmed", "between -0.6 and -0.4 (95 %)", "(0.01)", "2026-01-02", "a processor", "0.3M",
        "100 s of CPU", "**Elsewhere.** 1.4 times", "Predicted before the first run: 98%", "](muon.svg)", "delta 0.05",
        "muon, max_violation, arm - control: mean -0.8, 95 % -1 to -0.6",
    ):  # fmt: skip
        assert part in page, part
    assert load_card(paper, tmp_path) == card
    assert load_card(replace(paper, delta=0.1), tmp_path) is None, "a card of another claim"
    assert "<svg" in (tmp_path / "muon.svg").read_text()
    assert draw_differences(card) == draw_differences(card)


def test_a_card_of_logarithms_has_a_ratio_for_delta_and_geometric_means(tmp_path: Path):
    paper = replace(load_paper("muon"), scale="log", delta=1.25)
    result = make_result(paper, "better", [-0.5, -0.51, -0.49, -0.5])
    result["arms"]["muon"] = {**result["arms"]["muon"], "values": [1.0, 4.0]}
    page = write_card(paper, {"0.3M": result}, tmp_path).file.read_text()
    assert "log eval/loss, delta log 1.25, at most 12 pairs" in page
    assert "; log eval/loss, arm - control: between -0.6 and -0.4" in page
    assert "| 2.0000 | -0.6 to -0.4" in page
    assert "log eval/loss, arm - control" in (tmp_path / "muon.svg").read_text()
    assert comparison_claim(paper).delta == pytest.approx(0.2231, abs=1e-4)
    with pytest.raises(AssertionError, match=r"muon: delta 0\.05 is no difference \(of scale: log, a ratio above 1\)"):
        comparison_claim(replace(paper, delta=0.05))


def test_a_card_names_the_interval_that_decided_and_an_old_one_is_read_without_it(tmp_path: Path):
    paper = load_paper("qk_norm")
    comparison = Comparison(comparison_claim(paper), ["qk_norm"])
    for seed, difference in enumerate((0.02, 0.03, 0.01, 0.02), 1):
        comparison.add_pair(seed, 4.0, {"qk_norm": 4.0 + difference})
    verdict = {**comparison.verdict("qk_norm"), "secondary": {}}
    result = make_result(paper, verdict["outcome"], verdict["differences"])
    whole = {
        "experiment": "x", "verdicts": [verdict], "noise": {}, "notes": [],
        "arms": {"control": {"code": "c"}}, "arms_measured": result["arms"],
    }  # fmt: skip
    kept = shorten_result(whole, {})
    (low, high), wide = verdict["interval_90"], verdict["interval_95"]
    card = write_card(paper, {"0.3M": kept}, tmp_path)
    page = card.file.read_text()
    assert verdict["outcome"] == "not worse by delta"
    assert f"; decided by the 90 % interval, {low:+.4g} to {high:+.4g}, beside delta 0.05" in page
    assert f"; eval/loss, arm - control: between {wide[0]:+.4g} and {wide[1]:+.4g} (95 %)" in page
    assert card.summary()["effect"] == f"{low:+.3g} to {high:+.3g}, 90 %"
    assert load_card(paper, tmp_path) == card
    for key in ("interval_90", "decided_by"):
        del kept["verdicts"][0][key]
    old = write_card(paper, {"0.3M": kept}, tmp_path)
    assert "90 % interval" not in old.file.read_text()
    assert old.summary()["effect"] == f"{wide[0]:+.3g} to {wide[1]:+.3g}"


def test_a_second_size_joins_the_card_and_shows_the_trend(tmp_path: Path):
    paper = load_paper("qk_norm")
    write_card(paper, {"0.3M": make_result(paper, "not worse by delta", [-0.5, -0.51, -0.49, -0.5])}, tmp_path)
    card = write_card(
        paper, {"1M": make_result(paper, "undecided (time)", [-0.1, -0.11, -0.09, -0.1], 900_000)}, tmp_path
    )
    assert list(card.sizes) == ["0.3M", "1M"]
    assert card.verdict == "confirmed", "of the largest size that is decided"
    assert card.trend.startswith("fades from 0.3M to 1M: arm - control moves by +0.378 to +0.422 (90 %)")
    assert card.summary()["sizes"] == "0.3M, 1M (fades)"


def test_a_cards_command_says_which_seeds(tmp_path: Path):
    paper = load_paper("muon")
    result = make_result(paper, "better", [-0.5, -0.51, -0.49, -0.5])
    assert "`quest reproduce muon --size 0.3M`" in write_card(paper, {"0.3M": result}, tmp_path).file.read_text()
    result["verdicts"][0]["seeds"] = [401, 402, 403, 404]
    page = write_card(paper, {"0.3M": result}, tmp_path).file.read_text()
    assert "`quest reproduce muon --size 0.3M --first-seed 401`" in page
    command = make_paper_plan(paper, "0.3M", lambda text: None, first_seed=401).command
    assert command == "quest reproduce muon --size 0.3M --first-seed 401"


@pytest.mark.parametrize("name", ["muon", "qk_clip_magnitude"])
def test_a_claim_whose_arms_compute_the_same_is_undecided(tmp_path: Path, name: str):
    paper = load_paper(name)
    result = make_result(paper, "no difference larger than delta", [0.0] * 4)
    result["verdicts"][0]["reason"] = "every pair is identical"
    card = write_card(paper, {"0.3M": result}, tmp_path)
    assert card.verdict == "undecided"
    assert "every pair is identical" in card.file.read_text()
    few = make_result(paper, "no difference larger than delta", [0.0, 0.0, 0.0, 1e-6])
    assert write_card(paper, {"0.3M": few}, tmp_path).verdict != "undecided"


EQUAL = [-0.1, -0.11, -0.09, -0.1]


@pytest.mark.parametrize(
    ("small", "large", "word"),
    [
        (EQUAL, [-0.9, -0.91, -0.89, -0.9], "grows"),
        (EQUAL, [0.01, 0.0, 0.01, -0.01], "fades"),
        ([0.01, 0.0, 0.01, -0.01], EQUAL, "grows"),
        (EQUAL, [0.1, 0.11, 0.09, 0.1], "turns"),
        (EQUAL, [-0.1, -0.12, -0.08, -0.11], "holds"),
        (EQUAL, [-0.1, -0.2, 0.0, -0.1], "unclear"),
    ],
)
def test_trends(small: list[float], large: list[float], word: str):
    paper = load_paper("qk_norm")
    sizes = {"0.3M": make_result(paper, "better", small), "1M": make_result(paper, "better", large)}
    assert describe_trend(paper, sizes).startswith(f"{word} from 0.3M to 1M: ")
    assert describe_trend(paper, {"0.3M": sizes["0.3M"]}) == ""


@pytest.mark.parametrize(("change", "word", "most"), [(0.0, "grows|fades", 0.05), (0.05, "holds", 0.05)])
def test_a_trend_that_is_not_there_is_seen_in_one_card_of_twenty(change: float, word: str, most: float):
    """300 cards whose two sizes stop as their comparison does; pairs vary by 0.02, delta is 0.05."""
    paper, draw, found = load_paper("qk_norm"), np.random.default_rng(0), 0
    for _ in range(300):
        sizes = {}
        for size, effect in (("0.3M", 0.06), ("1M", 0.06 + change)):
            comparison = Comparison(comparison_claim(paper), ["qk_norm"])
            while comparison.open_arms:
                comparison.add_pair(comparison.pairs + 1, 0.0, {"qk_norm": effect + 0.02 * draw.standard_normal()})
            sizes[size] = make_result(paper, "open", comparison.arms["qk_norm"].differences)
        found += re.match(word, describe_trend(paper, sizes)) is not None
    assert found / 300 <= most


@pytest.mark.parametrize("name", sorted(shipped_verdicts()))
def test_shipped_cards_are_of_the_present_claims_and_agree_with_the_packages_verdicts(name: str):
    card = load_card(load_paper(name), DOCS)
    assert card is not None, "the claim has changed since: measure it again, and give --out docs/papers"
    assert card.summary() == shipped_verdicts()[name]
    assert f"## Verdict: {card.verdict}\n" in card.file.read_text(encoding="utf-8")
    for result in card.sizes.values():
        for verdict in result["verdicts"]:
            assert verdict["pairs"] >= 4
            assert (
                len(verdict["differences"]) + len({*verdict["diverged"], *verdict["control_diverged"]})
                == verdict["pairs"]
            )


def replay(paper: Paper, result: SizeResult) -> Comparison:
    """The comparison of a card's differences by the present rule; pairs behind a decision are kept."""
    verdicts = {one["arm"]: one for one in result["verdicts"]}
    comparison = Comparison(comparison_claim(paper), list(verdicts))
    for seed in sorted({seed for one in verdicts.values() for key in ("seeds", "diverged") for seed in one[key]}):
        values = {arm: dict(zip(one["seeds"], one["differences"], strict=True)) for arm, one in verdicts.items()}
        done = {arm: progress for arm, progress in comparison.arms.items() if progress.outcome != "open"}
        comparison.add_pair(seed, 0.0, {arm: values[arm].get(seed) for arm in verdicts})
        for arm, progress in done.items():
            if seed in values[arm]:
                progress.add(seed, values[arm][seed], 0.0)
    return comparison


@pytest.mark.parametrize("name", sorted(shipped_verdicts()))
def test_a_cards_outcomes_are_what_the_present_rule_says_of_its_differences(name: str):
    """A rule that changes changes verdicts: they are derived anew, and what they leave undecided is measured on."""
    paper = load_paper(name)
    card = load_card(paper, DOCS)
    assert card is not None
    for size, result in card.sizes.items():
        comparison = replay(paper, result)
        for found in result["verdicts"]:
            again = comparison.verdict(found["arm"])
            if found["outcome"] not in ("invalid", "undecided (time)"):
                assert again["outcome"] == found["outcome"], (size, found["arm"])
            assert again["size"] == found["size"]


def test_every_card_in_the_docs_is_shipped():
    assert {file.stem for file in DOCS.glob("*.json")} == set(shipped_verdicts())


def test_papers_shows_shipped_verdicts_beside_those_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLM_QUEST_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shipped = {"muon": {"verdict": "refuted", "sizes": "1M", "date": "d", "machine": "m", "effect": "e"}}
    monkeypatch.setattr(commands, "shipped_verdicts", lambda: shipped)
    paper = load_paper("muon")
    write_card(paper, {"0.3M": make_result(paper, "better", [-0.5, -0.51, -0.49, -0.5])}, commands.cards_dir())
    entries = {entry.name: entry for entry in commands.list_papers().entries}
    assert entries["muon"].verdict == "refuted (e; 1M, d, m)"
    assert entries["muon"].here.startswith("confirmed (-0.6 to -0.4; 0.3M, 2026-01-02")
    assert entries["qk_norm"].verdict == ""


def test_a_strong_effect_has_its_direction_in_a_short_run(tmp_path: Path):
    """Muon against AdamW in 30 steps. `python -m tests.papers.dry_run` runs all claims in short, and
    `python -m tests.papers.directions` the strong ones whole."""
    plan = make_paper_plan(load_paper("muon"), "0.3M", lambda text: None)
    short = ["max_steps=30", "warmup_steps=3", "batch_size=4", "learning_rate=0.01", "seed=1"]
    losses = {
        arm.name: run_arm(
            {"recipe": plan.recipe, "pairs": [*plan.pairs, *arm.pairs, *short], "folder": str(tmp_path / arm.name)}
        )
        for arm in (plan.control, *plan.arms)
    }
    assert losses["muon"]["metrics"]["eval/loss"] < losses["control"]["metrics"]["eval/loss"] - 0.05


def test_directions_that_one_pair_of_runs_shows_are_asked_again_others_every_day(monkeypatch: pytest.MonkeyPatch):
    """`python -m tests.papers.directions`, a part of CI."""
    assert directions.is_strong([-0.5, -0.51, -0.49, -0.5])
    assert not directions.is_strong([0.0273, 0.0233, 0.0237, 0.0153]), "far from 0, for four differences, it is not"
    known = directions.strong_directions()
    assert {"muon", "post_norm"} <= {one.paper for one in known}
    assert all((DOCS / f"{one.paper}.json").is_file() and set(one.rates) >= {one.arm, "control"} for one in known)
    assert len({one.paper for one in directions.of_today(known, 2)}) == 2
    monkeypatch.setattr(directions, "measure_difference", lambda one, seed, root: -one.sign)
    assert directions.main([known[0].paper]) == 1
    values = iter([-known[0].sign, known[0].sign, known[0].sign])
    monkeypatch.setattr(directions, "measure_difference", lambda one, seed, root: next(values))
    assert directions.main([known[0].paper]) == 0


def test_generated_rows_are_what_they_say():
    for row in list(generated_text.copies())[:50]:
        first, second = row["text"].split(" |")
        assert first == second
    a, b = next(generated_text.sums())["text"].split(" = ")
    assert sum(map(int, a.split(" + "))) == int(b)
    right = next(generated_text.reversals())
    task = TASKS["reverse"]()
    assert set(right["prompt"]) <= set(task.alphabet)
    pair = next(generated_text.reversal_pairs())
    assert pair["prompt"] == f"reverse({pair['chosen'][::-1]})="
    assert Counter(pair["chosen"]) == Counter(pair["rejected"])
    assert pair["chosen"] != pair["rejected"]
