"""Arms, budgets, tuning and edited code: what is compared, and what is refused before anything runs."""

from __future__ import annotations

import difflib
import math
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quest.cli import ablate
from llm_quest.cli.ablate import AblateOptions, AgentProtocol, make_claim, make_plan
from llm_quest.errors import UsageError
from llm_quest.experiments.arms import DEV, FIXED, default_pairs, parse_arm, parse_vary, split_values
from llm_quest.experiments.budgets import budget_pairs, shared_weights
from llm_quest.experiments.code_tree import (
    PACKAGE,
    CodeTree,
    differing_files,
    load_code_tree,
    open_edit,
    own_code,
    source_content,
)
from llm_quest.experiments.derived_settings import default_settings, find_derived_settings, flat_settings
from llm_quest.experiments.measurements import read_metric, require_reported_seeds
from llm_quest.experiments.run_costs import count_runs
from llm_quest.experiments.tuning import RateSearch, describe_search, first_grid, needs_extension
from llm_quest.experiments.verdict_lines import interval_bar
from llm_quest.recipes.config import recipe_names
from tests.experiments.bench import patch_package

ROOT = Path(__file__).parents[2]


def plan(tmp_path: Path, log: list[str] | None = None, pairs: tuple[str, ...] = (), **options: Any) -> Any:
    return make_plan("tiny", pairs, AblateOptions(**options), tmp_path, (log if log is not None else []).append)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a,b", ["a", "b"]),
        ("[lora],[{name: dyt, form: 'a,b'}, x]", ["[lora]", "[{name: dyt, form: 'a,b'}, x]"]),
        ("1", ["1"]),
    ],
)
def test_values_are_separated_by_commas_outside_of_brackets(text: str, values: list[str]):
    assert list(split_values(text)) == values


def test_an_arm_is_a_name_and_settings():
    assert list(parse_vary("optim=adamw,muon")) == [("optim=adamw", ("optim=adamw",)), ("optim=muon", ("optim=muon",))]
    assert parse_arm("big=batch_size=64 techniques='[{name: lora, rank: 8}]'") == (
        "big", ("batch_size=64", "techniques=[{name: lora, rank: 8}]"),
    )  # fmt: skip
    for wrong in ("big", "big=", "big=batch_size", "a b=x=1"):
        with pytest.raises(UsageError, match="expected name="):
            parse_arm(wrong)


def test_what_decides_last_bits_is_fixed_unless_it_is_given():
    assert set(default_pairs("tiny", [])) == {f"{key}={value}" for key, value in FIXED.items()}
    assert "precision=fp32" not in default_pairs("tiny", ["precision=bf16"])
    assert not any(pair.startswith("seed_per_module") for pair in default_pairs("sft", []))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing varies"),
        ({"vary": ("optim=muon",)}, "no arm differs"),
        ({"vary": ("seed=1,2",)}, "--first-seed says which seeds"),
        ({"vary": ("max_steps=10,20",)}, "--budget decide"),
        ({"vary": ("optim=adamw,adamw",)}, "two arms are called optim=adamw"),
        ({"arms": ("control=batch_size=4",)}, "two arms are called control"),
        ({"vary": ("optim=adamw",), "cap": 1}, "1 pairs decide nothing"),
        ({"vary": ("optim=adamw",), "cap": 13}, "thresholds are known for 8, 12"),
        ({"vary": ("optim=adamw",), "budget": "joules"}, "known are flops, steps"),
        ({"vary": ("optim=adamw",), "delta": 0.0}, "above 0"),
        ({"vary": ("optim=adamw",), "scale": "square"}, "known are linear, log"),
        ({"vary": ("optim=adamw",), "scale": "log"}, "--delta is missing: with --scale log .* ratio"),
        ({"vary": ("optim=adamw",), "scale": "log", "delta": 0.03}, "--delta 0.03: with --scale log .* above 1"),
        ({"vary": ("optim=adamw",), "first_seed": 101}, "seeds 101 to 200 are for tuning"),
        ({"vary": ("optim=adamw",), "first_seed": 95}, "take 1 to 89, or 401"),
        ({"vary": ("optim=adamw",), "metrics": ("eval/perplexity",)}, "--delta is missing"),
        ({"code": ("nowhere.patch",)}, "no such file or folder"),
        ({"vary": ("optim=adamm",)}, "optim"),
    ],
)
def test_what_no_verdict_can_rest_on_is_refused(tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        plan(tmp_path, **options)


def test_an_arm_that_is_the_control_is_said_and_left_out(tmp_path: Path):
    log: list[str] = []
    found = plan(tmp_path, log, vary=("optim=adamw,muon",))
    assert [arm.name for arm in found.arms] == ["optim=adamw"]
    assert log == ["optim=muon changes nothing: it is the control; not run"]


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_setting_that_a_shorter_run_changes_is_derived(recipe: str):
    """The settings after defaults say which; what the command line gives is not derived."""
    own = default_settings(recipe)
    if own.get("max_steps") is None or own.get("num_train_epochs") is not None:
        return
    short = flat_settings(recipe, ("max_steps=20",))
    changed = {key for key in {**own, **short} if own.get(key) != short.get(key)} - {"max_steps"}
    derived = find_derived_settings(recipe, ("max_steps=20",))
    assert {key: one["value"] for key, one in derived.items()} == {key: short[key] for key in changed}
    assert not find_derived_settings(recipe, ("max_steps=20", "warmup_steps=7"))


def test_what_ablate_fixes_and_what_a_shorter_run_changes_is_told_apart():
    pairs = [*default_pairs("pretrain", []), DEV, "max_steps=120"]
    derived = find_derived_settings("pretrain", pairs)
    assert derived.pop("warmup_steps") == {"recipe": 50, "value": 6, "why": "shortened with max_steps"}
    assert {one["why"] for one in derived.values()} == {"fixed by quest ablate for all arms"}
    assert derived["eval_steps"] == {"recipe": 200, "value": 0, "why": "fixed by quest ablate for all arms"}
    assert "warmup_steps" not in find_derived_settings("pretrain", [*pairs, "warmup_steps=50"])
    assert flat_settings("pretrain", [*pairs, "warmup_steps=50"])["warmup_steps"] == 50
    sizes = find_derived_settings("pretrain", ["model.preset=llama3.2-1b"])
    assert sizes["model.config.hidden_size"]["value"] is None, "the recipe's own sizes go with its model"


def test_the_runs_of_a_plan_are_counted_in_one_way(tmp_path: Path):
    counts = plan(tmp_path, vary=("optim=adamw",), cap=8).counts
    assert (counts.tuning, counts.tuning_more, counts.aa, counts.least, counts.most) == (12, 12, 7, 27, 47)
    assert "7 runs for 3 A/A pairs" in str(counts)
    assert count_runs(2, 1, 2, 0, 8).least == 8
    begun = count_runs(2, 3, 2, 2, 8, bases=2)
    assert begun.start_seeds == (2 + 2 + 4, 2 + 2 + 8), "tuning seeds, A/A seeds, pairs"
    assert str(begun).endswith("25 to 45 runs and 16 to 24 that they begin from")
    assert count_runs(2, 1, 2, 2, 8, bases=1).start_seeds == (6, 10), "one rate needs no tuning seeds"


def test_a_rate_between_those_tried_is_explained():
    search = RateSearch({0.001: 2.0, 0.004: 1.0, 0.016: 1.5})
    assert "(between the rates: the vertex of the parabola through the best)" in describe_search("a", search)
    assert "vertex" not in describe_search("a", RateSearch({0.001: 2.0, 0.004: 1.0, 0.016: 2.0}))


def test_the_name_of_an_experiment_follows_from_its_claim(tmp_path: Path):
    one, same, other = (plan(tmp_path, vary=("optim=adamw",), delta=d) for d in (0.03, 0.03, 0.05))
    assert one.experiment == same.experiment != other.experiment


def test_policies_are_judged_by_accuracy_with_the_sign_test():
    claim = make_claim("grpo", AblateOptions())
    assert (claim.metric, claim.greater_is_better, claim.normal) == ("eval/accuracy", True, False)
    assert make_claim("pretrain", AblateOptions()).normal


def test_a_ratio_is_compared_on_the_log_scale(tmp_path: Path):
    claim = make_claim("gkd", AblateOptions(metrics=("eval/loss",), delta=1.1, scale="log"))
    assert claim.measure == "log eval/loss"
    assert claim.delta == claim.rescale(1.1) == math.log(1.1)
    assert (
        plan(tmp_path, vary=("optim=adamw",), delta=1.1).experiment
        != plan(tmp_path, vary=("optim=adamw",), delta=1.1, scale="log").experiment
    )


def description(**changed: Any) -> dict[str, Any]:
    return {
        "max_steps": 200, "warmup_steps": 20, "flops_per_step": 100.0, "units_per_step": 512, "step_seconds": 1.0,
        "parameters": 1000, **changed,
    }  # fmt: skip


def test_budgets_give_each_arm_its_steps():
    control, wide = description(), description(flops_per_step=150.0, units_per_step=256, step_seconds=0.5)
    found = {name: budget_pairs(name, wide, control, "wide") for name in ("flops", "steps", "tokens", "seconds")}
    assert found == {
        "flops": ("max_steps=133", "warmup_steps=13"),
        "steps": ("max_steps=200", "warmup_steps=20"),
        "tokens": ("max_steps=400", "warmup_steps=40"),
        "seconds": ("max_steps=400", "warmup_steps=40"),
    }
    own = budget_pairs("flops", {**wide, "warmup_steps": 50}, control, "wide")
    assert own == ("max_steps=133", "warmup_steps=50"), "an arm's own warm-up stays"


def test_budgets_that_cannot_be_equal_are_refused():
    control = description(max_steps=10, warmup_steps=1)
    with pytest.raises(UsageError, match=r"would need 9.35 steps .*\n.*max_steps larger"):
        budget_pairs("flops", description(flops_per_step=107.0), control, "wide")
    with pytest.raises(UsageError, match="wide has 1,100, the control 1,000"):
        budget_pairs("parameters", description(parameters=1100), control, "wide")
    assert budget_pairs("parameters", description(parameters=1009), control, "wide")[0] == "max_steps=10"
    with pytest.raises(UsageError, match="can't be counted beforehand"):
        budget_pairs("flops", {"max_steps": 5, "warmup_steps": 0}, {"max_steps": 5, "warmup_steps": 0}, "policy")


def test_shared_weights_are_counted_in_parameters():
    arm = {"weights": {"a": "1", "b": "2"}, "sizes": {"a": 30, "b": 10}}
    assert shared_weights(arm, {"weights": {"a": "1", "b": "3"}}) == 0.75


def search(losses: dict[float, float]) -> RateSearch:
    return RateSearch(losses)


def finish_search(center: float, loss: Callable[[float], float]) -> RateSearch:
    """Three rates, and more while they say where the best one is."""
    losses = {rate: loss(rate) for rate in first_grid(center, 3)}
    while needs_extension({"arm": search(losses)}, 3):
        rate = search(losses).next_rate()
        assert rate not in losses, "each rate is another one"
        losses[rate] = loss(rate)
    return search(losses)


@pytest.mark.parametrize("middle", np.linspace(-9.0, -5.0, 9).tolist())
def test_the_chosen_rate_is_the_vertex_of_the_parabola(middle: float):
    """Losses of a parabola around 2^-7 in log2(rate)."""
    found = finish_search(2.0**middle, lambda rate: (math.log2(rate) + 7.0) ** 2)
    assert abs(math.log2(found.choose()) + 7.0) <= 0.26, describe_search("arm", found)
    assert len(found.losses) <= 5


def test_a_search_without_a_parabola_takes_its_best_rate():
    assert search({1e-3: 3.0, 4e-3: 2.0, 16e-3: math.inf}).choose() == 4e-3, "a cliff on one side"
    assert search({1e-3: 2.0}).choose() == 1e-3
    assert not search({1e-3: 2.0}).is_open


def test_every_arm_gets_the_same_number_of_rates():
    """While one lies at an edge: that one goes on, the others look closer."""
    edge, inside = search({1e-3: 3.0, 4e-3: 2.0, 16e-3: 1.0}), search({1e-3: 2.0, 4e-3: 1.0, 16e-3: 1.5})
    assert needs_extension({"edge": edge, "inside": inside}, 3)
    assert edge.next_rate() == 64e-3
    assert inside.next_rate() == 8e-3, "between the best and the better of its neighbors"
    assert not needs_extension({"inside": inside}, 3)
    seven = search({x: x for x in np.geomspace(1e-4, 1e-2, 7).tolist()})
    assert not needs_extension({"seven": seven}, 3), "not for ever"
    assert search({0.25: 2.0, 1.0: 1.0}).next_rate() <= 1.0, "what a recipe takes"
    assert first_grid(2e-3, 3) == [5e-4, 2e-3, 8e-3]
    assert first_grid(0.5, 3) == [0.125, 0.5]


@pytest.mark.parametrize("height", [0.05, 0.5, 5.0, math.inf])
@pytest.mark.parametrize("cliff", [-6.6, -5.5, -4.1])
def test_a_rate_at_which_training_collapses_does_not_move_the_chosen_one(cliff: float, height: float):
    """A parabola around 2^-7 until a rate from which on all is lost, whatever is lost there."""

    def loss(rate: float) -> float:
        return height if math.log2(rate) > cliff else 0.01 * (math.log2(rate) + 7.0) ** 2

    for middle in (-8.0, -7.5, -7.0, -6.7):
        found = finish_search(2.0**middle, loss)
        assert abs(math.log2(found.choose()) + 7.0) <= 0.76, describe_search("arm", found)


def test_a_run_that_does_not_report_a_finite_loss_has_diverged():
    finished = {"status": "finished", "metrics": {"eval/loss": 5.0, "eval/odd": None}}
    assert read_metric(finished, "eval/loss", "arm", 512) == 5.0
    assert read_metric(finished, "eval/loss", "arm", 100) is None, "above ln(vocabulary)"
    assert read_metric(finished, "eval/odd", "arm") is None
    assert read_metric({"status": "diverged", "metrics": {}}, "eval/loss", "arm") is None
    with pytest.raises(UsageError, match="arm reports no such number; it has eval/loss"):
        read_metric(finished, "eval/accuracy", "arm")


def test_seeds_have_classes():
    for first in (1, 89, 201, 401, 1000):
        require_reported_seeds(first, 12)
    for first in (90, 101, 190, 300, 400):
        with pytest.raises(UsageError, match="can't be"):
            require_reported_seeds(first, 12)


@pytest.fixture
def worktree(tmp_path: Path) -> Path:
    """A git repository with a package of one file."""
    folder = tmp_path / "tree"
    (folder / "llm_quest").mkdir(parents=True)
    (folder / "llm_quest" / "__init__.py").write_text("X = 1  # one\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(folder), *identity, *words], check=True)
    return folder


def test_a_worktree_is_taken_as_committed_or_not_at_all(worktree: Path, tmp_path: Path):
    tree = open_edit(str(worktree), tmp_path / "code")
    assert tree.revision
    assert not tree.revision.endswith("+")
    (worktree / "llm_quest" / "__init__.py").write_text("X = 2\n")
    with pytest.raises(UsageError, match=r"uncommitted changes \(llm_quest/__init__.py\)"):
        open_edit(str(worktree), tmp_path / "code")
    with pytest.raises(UsageError, match="holds no llm_quest"):
        open_edit(str(tmp_path), tmp_path / "code")


def test_words_and_layout_are_no_edit(worktree: Path):
    def tree(text: str) -> CodeTree:
        (worktree / "llm_quest" / "__init__.py").write_text(text)
        return load_code_tree(worktree)

    base = tree('"""A."""\nX = f(1, 2)  # one\n')
    copy = worktree.parent / "copy"
    (copy / "llm_quest").mkdir(parents=True)
    for text, changed in [('"""B."""\n# two\nX = f(1,\n  2,)\n', []), ("X = f(1, 3)\n", ["__init__.py"])]:
        (copy / "llm_quest" / "__init__.py").write_text(text)
        assert differing_files(base, load_code_tree(copy)) == changed


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("def f(a, *, b=1):\n    # other words\n    total = a + b\n    return [total for _ in (total,)]\n", True),
        ("def f(a, *, b=1):\n    c = a - b\n    return [c for _ in (c,)]\n", False),
        ("def f(x, *, b=1):\n    c = x + b\n    return [c for _ in (c,)]\n", False),  # arguments are given by name
        ("def f(a, *, b=2):\n    c = a + b\n    return [c for _ in (c,)]\n", False),
        ("def f(a, *, b=1):\n    c = b + a\n    return [c for _ in (c,)]\n", False),
    ],
)
def test_names_of_local_variables_are_no_edit(text: str, same: bool):
    before = 'def f(a, *, b=1):\n    """Adds."""\n    c = a + b\n    return [c for _ in (c,)]\n'
    assert (source_content(text) == source_content(before)) is same
    local = "def g():\n    {name} = 1\n    return locals()\n"
    assert source_content(local.format(name="x")) != source_content(local.format(name="y"))


def test_an_arm_that_changes_how_it_is_scored_is_refused(tmp_path: Path):
    for arms, message in (
        (("x=data.held_out=0.2",), "scored on the same data"),
        (("x=eval_tokens=100",), "scored on the same data"),
        (("x=data.eval_part=all",), "scored on the same data"),
    ):
        with pytest.raises(UsageError, match=message):
            make_plan("tiny", [], AblateOptions(arms=arms), tmp_path, print)
    with pytest.raises(UsageError, match="quest ablate --confirm NAME"):
        make_plan("tiny", ["data.eval_part=test"], AblateOptions(arms=("x=optim=adamw",)), tmp_path, print)
    loss = "loss = nats / batches.num_targets"
    patch = patch_package(tmp_path / "better.patch", "eval/evaluators.py", loss, loss.replace("nats", "0.5 * nats"))
    with pytest.raises(UsageError, match=r"better\.patch edits eval/evaluators\.py, which scores all arms"):
        make_plan("tiny", [], AblateOptions(code=(patch,)), tmp_path, print)
    assert make_plan("tiny", [], AblateOptions(arms=("x=optim=adamw",)), tmp_path, print).pairs[-1] == DEV


def test_a_patch_that_does_not_apply_is_named_with_the_reason(tmp_path: Path):
    patch = tmp_path / "edit.patch"
    patch.write_text("--- a/llm_quest/nowhere.py\n+++ b/llm_quest/nowhere.py\n@@ -1,1 +1,1 @@\n-a\n+b\n")
    with pytest.raises(UsageError, match=r"does not apply to this package: .*nowhere\.py"):
        open_edit(str(patch), tmp_path / "code")
    assert not list((tmp_path / "code").glob("*")), "nothing is left"


def test_a_patch_whose_edit_is_still_in_the_package_is_refused_with_the_way_back(tmp_path: Path):
    """The control would run the edit too."""
    name, patch = "layers/initialize.py", tmp_path / "edit.patch"
    now = (PACKAGE / name).read_text(encoding="utf-8").splitlines(keepends=True)
    before = [*now[:20], "BEFORE = 1\n", *now[20:]]
    file = f"llm_quest/{name}"
    patch.write_text("".join(difflib.unified_diff(before, now, f"a/{file}", f"b/{file}")), encoding="utf-8")
    with pytest.raises(UsageError, match=r"in this package already, so the control would run it too.*git apply -R"):
        open_edit(str(patch), tmp_path / "code")


def test_a_control_with_uncommitted_changes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    layers = "layers: Any = model.config"
    edit = layers.replace("model", "4 * model")
    patch = patch_package(tmp_path / "edit.patch", "layers/initialize.py", layers, edit)
    for revision, told in (("abc", False), ("abc+", True)):
        monkeypatch.setattr(ablate, "own_code", lambda revision=revision: replace(own_code(), revision=revision))
        log: list[str] = []
        plan(tmp_path, log, code=(patch,))
        assert any("the control and every patch run with them" in line for line in log) is told


def test_the_hash_of_the_code_is_of_what_a_run_computes():
    names = own_code().files
    assert "layers/attention.py" in names
    assert "recipes/tiny.yaml" in names
    assert not any(name.startswith(("cli/", "experiments/", "papers/")) for name in names)


def test_the_protocol_for_agents_is_the_page_of_the_docs():
    lines = AgentProtocol().lines()
    assert len(lines) < 60
    assert "\n".join(lines) + "\n" == (ROOT / "docs" / "agents.md").read_text(encoding="utf-8")


def test_the_bar_of_an_interval():
    assert interval_bar(-0.5, 0.5, 1.0) == "--------:-==|==-:--------"
    assert interval_bar(4.0, 5.0, 1.0).endswith(">")
    assert interval_bar(-5.0, -4.0, 1.0).startswith("<")
