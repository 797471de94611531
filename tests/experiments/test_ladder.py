"""`quest ladder`: the law finds what made the losses, its intervals hold, runs are kept, what cannot be is refused."""

from __future__ import annotations

import json
import random
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from llm_quest.cli.ladder import LadderOptions, make_ladder_plan, parse_budgets
from llm_quest.cli.ledger import list_experiments
from llm_quest.cli.train import estimate_cost
from llm_quest.errors import DataError, UsageError
from llm_quest.experiments.ladder import Ladder, LadderPlan, describe_rung
from llm_quest.experiments.ladder_forecast import forecast_loss, read_ladder
from llm_quest.experiments.ladder_page import write_ladder_page
from llm_quest.experiments.ledger import Ledger, find_faults
from llm_quest.experiments.rungs import TokenBudget, choose_shapes, layer_period
from llm_quest.experiments.scaling_law import (
    LadderPoint,
    fit_scaling_law,
    has_paired_seeds,
    leave_one_out,
    predict_loss,
)
from llm_quest.experiments.worker import handle_request
from llm_quest.formatting import parse_quantity
from llm_quest.models.build import build_meta_model, count_parameters, preset
from llm_quest.models.resize import resize_config
from llm_quest.recipes.planning import open_job
from llm_quest.recipes.recipe import load_recipe
from tests.experiments.bench import write_text

SIZES = (3e4, 6e4, 1.2e5, 2.5e5, 5e5)


def law_of_n(n: float) -> float:
    return 1.8 + 2.0 * (n / 1e5) ** -0.3


def law_of_both(n: float, d: float) -> float:
    return 1.8 + (n / 1e5) ** -0.3 + (d / 1e6) ** -0.4


def simulate(rng: random.Random, sd: float, seeds: int = 3) -> list[LadderPoint]:
    return [LadderPoint(n, 10 * n, tuple(law_of_n(n) + rng.gauss(0, sd) for _ in range(seeds))) for n in SIZES]


def test_the_law_is_found_where_there_is_no_noise():
    law = fit_scaling_law(simulate(random.Random(0), 0.0))
    assert (law.floor, law.n_exponent) == (pytest.approx(1.8, abs=0.01), pytest.approx(0.3, abs=0.01))
    assert law.predict(2e6, 2e7) == pytest.approx(law_of_n(2e6), abs=0.003)
    both = [LadderPoint(n, r * n, (law_of_both(n, r * n),)) for n in SIZES for r in (5, 10, 20)]
    law = fit_scaling_law(both)
    assert (law.n_exponent, law.d_exponent) == (pytest.approx(0.3, abs=0.03), pytest.approx(0.4, abs=0.03))
    assert law.predict(2e6, 2e7) == pytest.approx(law_of_both(2e6, 2e7), abs=0.01)


def test_the_intervals_hold_what_comes():
    """Simulated ladders: the size four times beyond the largest, and each size left out."""
    rng, inside, left_out, worlds = random.Random(3), 0, [], 40
    for seed in range(worlds):
        points = simulate(rng, 0.01)
        found = predict_loss(points, 2e6, 2e7, seed=seed)
        inside += found.covers(law_of_n(2e6) + rng.gauss(0, 0.01))
        assert abs(found.loss - law_of_n(2e6)) < 0.1
        assert found.high - found.low < 0.4
        if seed < 8:
            left_out += [one.covers(p.mean) for one, p in zip(leave_one_out(points), points, strict=True)]
    assert inside >= 0.9 * worlds
    assert sum(left_out) >= 0.9 * len(left_out)


def simulate_paired(rng: random.Random, sd: float, seed_sd: float, seeds: int = 2) -> tuple[list[LadderPoint], float]:
    """Sizes with the same tokens, whose losses share an effect of each seed; and the target's with the first seed."""
    effects = [rng.gauss(0, seed_sd) for _ in range(seeds)]
    points = [LadderPoint(n, 1e6, tuple(law_of_n(n) + b + rng.gauss(0, sd) for b in effects)) for n in SIZES]
    return points, law_of_n(2e6) + effects[0] + rng.gauss(0, sd)


def test_the_effects_of_seeds_cancel_where_all_sizes_read_the_same_batches():
    rng, inside, left_out, widths, worlds = random.Random(5), 0, [], [0.0, 0.0], 30
    for seed in range(worlds):
        points, measured = simulate_paired(rng, 0.003, 0.03)
        paired = predict_loss(points, 2e6, 1e6, seed=seed, paired=True)
        inside += paired.covers(measured)
        assert abs(paired.loss - measured) < 0.05, "the seed's effect, which is 0.03, is part of the prediction"
        if seed < 5:
            left_out += [one.covers(p.mean) for one, p in zip(leave_one_out(points), points, strict=True)]
            unpaired = predict_loss(points, 2e6, 1e6, seed=seed)
            widths = [widths[0] + paired.high - paired.low, widths[1] + unpaired.high - unpaired.low]
    assert inside >= 0.9 * worlds
    assert sum(left_out) >= 0.9 * len(left_out)
    assert widths[0] < 0.7 * widths[1]
    assert has_paired_seeds(points)
    assert not has_paired_seeds(simulate(rng, 0.01)), "more tokens for larger sizes are other batches"


def test_losses_that_make_no_law_are_refused():
    flat = [LadderPoint(n, 10 * n, (2.0 + n / 1e7,)) for n in SIZES]
    with pytest.raises(DataError, match="don't fall with the number of parameters"):
        fit_scaling_law(flat)
    cliff = [LadderPoint(n, 10 * n, (9.0 if n == SIZES[0] else 2.0,)) for n in SIZES]
    with pytest.raises(DataError, match="does not converge"):
        fit_scaling_law(cliff)


def settings(text: Path) -> list[str]:
    return [
        f"data.source={text}", "data.separator='\\n\\n'", "tokenizer.vocab_size=300", "sequence_length=32",
        "batch_size=2", "max_steps=60", "warmup_steps=3", "learning_rate=2e-2", "optim=adamw",
        "model.config.hidden_size=32", "model.config.num_attention_heads=8", "model.config.num_key_value_heads=4",
        "model.config.num_hidden_layers=1", "model.config.intermediate_size=64",
    ]  # fmt: skip


OPTIONS: dict[str, Any] = {
    "rungs": 4, "smallest": 4e3, "largest": 13e3, "budgets": (TokenBudget(0.5),), "seeds": 1, "rates": 1, "run": 1,
}  # fmt: skip


def plan_of(text: Path, *pairs: str, **options: Any) -> LadderPlan:
    return make_ladder_plan("pretrain", [*settings(text), *pairs], LadderOptions(**{**OPTIONS, **options}))


class InProcess:
    """A pool whose worker is this process: it answers requests as a worker does."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def submit(self, code: Any, request: dict[str, Any]) -> Future[dict[str, Any]]:
        self.asked += [request["folder"]] if request["do"] == "run" else []
        found: Future[dict[str, Any]] = Future()
        found.set_result(handle_request(request))
        return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def plan(text: Path) -> LadderPlan:
    """To look at; making it builds each size."""
    return plan_of(text)


def test_a_ladder_from_its_claim_to_its_outcome(plan: LadderPlan, tmp_path: Path):
    pool, ledger, lines = InProcess(), Ledger(tmp_path / "ledger.jsonl"), list[str]()
    result = Ladder(plan, tmp_path, pool, ledger, lines.append).run()  # type: ignore[arg-type]
    assert len(pool.asked) == 5
    losses = [rung["losses"][0] for rung in result["rungs"]]
    assert losses[0] > losses[-1] > result["measured"]["mean"] - 0.1
    assert result["measured"]["error"] == result["prediction"]["loss"] - result["measured"]["mean"]
    kinds = [row["kind"] for row in ledger.rows() if row["kind"] not in ("started", "run")]
    assert kinds == ["claim", "prediction", "outcome"]
    order = [row["kind"] if row["kind"] != "started" else row["arm"] for row in ledger.rows()]
    assert order.index("prediction") < order.index(plan.target.name), "the prediction is written before the run"
    assert find_faults(ledger.rows()) == []
    shown = list_experiments(tmp_path / "ledger.jsonl", lines.append).lines()
    assert any("predicted eval/loss" in line for line in shown)
    again = Ladder(plan, tmp_path, pool, ledger, lines.append).run()  # type: ignore[arg-type]
    assert len(pool.asked) == 5, "finished runs are kept"
    assert json.dumps(again) == json.dumps(result)
    write_ladder_page(result, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert plan.rungs[0].name in page


def test_rungs_keep_shape_and_tokens_and_carry_the_rate(plan: LadderPlan):
    small, *larger = plan.rungs
    assert [pair for pair in small.pairs if "parametrization" in pair] == [
        "parametrization.name=completep", f"parametrization.base.hidden_size={small.config.hidden_size}",
    ]  # fmt: skip
    for rung in (*larger, plan.target):
        assert f"parametrization.base.hidden_size={small.config.hidden_size}" in rung.pairs
        assert rung.tokens / rung.n == pytest.approx(0.5, rel=0.01)
        assert rung.config.hidden_size == 4 * rung.config.num_attention_heads
    assert layer_period(preset("qwen3-next-tiny").config) == 4


def test_sizes_with_equal_tokens_read_the_same_batches(text: Path, tmp_path: Path):
    """As many steps for all, and the order follows from the seed alone."""
    plan = plan_of(text, budgets=(TokenBudget(2_000, per_parameter=False),))
    assert {rung.steps for rung in (*plan.rungs, plan.target)} == {31}
    assert plan.target.name.endswith("-2k")
    seen = []
    for rung in (plan.rungs[0], plan.target):
        recipe, config, whole = load_recipe("pretrain", [*plan.pairs, *rung.pairs, "seed=1"])
        with open_job(recipe, config, whole, lambda line: None, tmp_path) as job:
            seen.append([batch.input_ids.tolist() for batch in job.loader.batches(7)])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("family", ["qwen3-tiny", "qwen3-next-tiny"])
def test_rungs_of_equal_depth_differ_in_width_alone(family: str):
    """Five layers are no multiple of a pattern's period."""
    whole = resize_config(preset(family).config, heads=16, layers=5)
    total = count_parameters(build_meta_model(whole))
    rungs = [small for small, _ in choose_shapes(whole, 5, total / 16, total / 2, "width")]
    assert {small.num_hidden_layers for small in rungs} == {5}
    widths = [small.hidden_size for small in rungs]
    assert widths == sorted(set(widths)), "every rung is wider than the one before"
    assert {small.hidden_size / small.num_attention_heads for small in rungs} == {whole.hidden_size / 16}


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ((), {"rungs": 1}, "at least 4 sizes"),
        ((), {"smallest": 5e4, "largest": 1e4}, "no ladder"),
        ((), {"budgets": (TokenBudget(0.21),)}, "can't be equal"),
        ((), {"scale": "depth"}, "known are width, both"),
        ((), {"kind": "mean-field"}, "known are standard, mup, completep"),
        (("model.config.num_attention_heads=2", "model.config.num_key_value_heads=1"), {}, "more and narrower"),
        (("seed=3",), {}, "can't set seed"),
    ],
)
def test_what_makes_no_ladder_is_said(text: Path, pairs: tuple[str, ...], options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        plan_of(text, *pairs, **options)


def test_numbers_of_the_command_line():
    assert [parse_quantity(one, "--smallest") for one in ("50k", "1.5M", "0", "2e9")] == [5e4, 1.5e6, 0, 2e9]
    assert parse_budgets("5, 10,20", "") == tuple(map(TokenBudget, (5, 10, 20)))
    assert parse_budgets("", "500k") == (TokenBudget(5e5, per_parameter=False),)
    assert parse_budgets("", "") == ()
    for given in (("5,10", ""), ("", "0"), ("5", "1M")):
        with pytest.raises(UsageError, match="--tokens"):
            parse_budgets(*given)
    with pytest.raises(UsageError, match="--smallest 'many' is no number"):
        parse_quantity("many", "--smallest")
    with pytest.raises(UsageError, match="is no number"):
        parse_budgets("5;10", "")
    with pytest.raises(UsageError, match="of the kind sft"):
        make_ladder_plan("sft", ["model.load=x", "data.source=y"], LadderOptions())


def test_a_plan_shows_the_loss_that_a_ladder_predicts(text: Path, plan: LadderPlan, tmp_path: Path):
    rungs = [{**describe_rung(rung), "losses": [law_of_n(rung.n)]} for rung in plan.rungs]
    ladder = {"experiment": "ladder-x", "recipe": "pretrain", "settings": list(plan.pairs), "rungs": rungs}
    file = tmp_path / "result.json"
    file.write_text(json.dumps(ladder))
    steps = f"max_steps={plan.target.steps}"
    found = estimate_cost("pretrain", [*settings(text), steps], measure=False, log=lambda line: None, ladder=file)
    loss = found.as_json()["predicted_loss"]
    assert loss["loss"] == pytest.approx(law_of_n(plan.target.n), abs=0.01)
    assert f"predicted eval/loss  {loss['loss']:.3f}" in "\n".join(found.lines())
    with pytest.raises(UsageError, match=f"set max_steps={plan.target.steps // 10}"):
        forecast_loss(file, "pretrain", settings(text))
    with pytest.raises(UsageError, match="another batch_size"):
        forecast_loss(file, "pretrain", [*settings(text), steps, "batch_size=3"])
    same = [rung | {"tokens": 64 * 500} for rung in rungs]
    file.write_text(json.dumps(ladder | {"rungs": same}))
    with pytest.raises(UsageError, match=r"saw 32,000 tokens.*set max_steps=500,.*quest ladder --tokens 1M"):
        forecast_loss(file, "pretrain", [*settings(text), "max_steps=400"])
    assert forecast_loss(file, "pretrain", [*settings(text), "max_steps=500"])["loss"] == loss["loss"]
    file.write_text(json.dumps(ladder | {"rungs": rungs[:2]}))
    with pytest.raises(DataError, match="fewer than four sizes"):
        read_ladder(file)
