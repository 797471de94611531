"""`quest ladder`: trains smaller models of a recipe, fits a scaling law to their losses, and predicts the loss of the
recipe's own model before it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.cli.output import command_line
from llm_quest.contracts import LogFn
from llm_quest.errors import UsageError
from llm_quest.experiments.arms import default_pairs, refuse_own_keys
from llm_quest.experiments.code_tree import own_code
from llm_quest.experiments.ladder import Ladder, LadderPlan, describe_outcome, describe_prediction
from llm_quest.experiments.ladder_page import write_ladder_page
from llm_quest.experiments.ledger import Ledger
from llm_quest.experiments.rungs import SCALES, TokenBudget, make_rungs
from llm_quest.experiments.worker_pool import exclusive_pool
from llm_quest.files import atomic_write_json
from llm_quest.formatting import align_columns, parse_quantity
from llm_quest.models.parametrization import PARAMETRIZATIONS
from llm_quest.recipes.recipe import load_recipe


@dataclass(frozen=True)
class LadderOptions:
    """The options of `quest ladder`. smallest, largest: parameters, 0 for a 64th and a 4th of the model's."""

    rungs: int = 5
    smallest: float = 0.0
    largest: float = 0.0
    budgets: tuple[TokenBudget, ...] = ()
    seeds: int = 2
    rates: int = 3
    tuned: int = 2
    kind: str = "completep"
    scale: str = "width"
    run: int = 0
    jobs: int = 1


@dataclass(frozen=True)
class LadderReport:
    """The result of a ladder and where its files are."""

    result: Mapping[str, Any]
    folder: Path
    ledger: Path

    def as_json(self) -> dict[str, Any]:
        return {**self.result, "folder": str(self.folder), "ledger": str(self.ledger)}

    def lines(self) -> list[str]:
        """The table, the law, the prediction, and how far it was."""
        head = ("size", "parameters", "tokens", "FLOPs", "loss", "from the others")
        rows = [
            (rung["name"], f"{rung['parameters']:,}", f"{rung['tokens']:,}", f"{rung['flops']:.2e}",
             " ".join(f"{loss:.4f}" for loss in rung["losses"]),
             "{loss:.4f} ({low:.4f} to {high:.4f})".format(**rung["predicted_by_others"]))
            for rung in self.result["rungs"]
        ]  # fmt: skip
        found = [*align_columns([head, *rows]), f"law: {self.result['law']['formula']}"]
        found.append(describe_prediction(self.result))
        if self.result["measured"]:
            target = self.result["target"]["name"]
            found.append(describe_outcome(target, self.result["prediction"], self.result["measured"]))
        found += [f"note: {text}" for text in self.result["notes"]]
        return [*found, f"page: {self.folder / 'report.html'}", f"ledger: {self.ledger}"]


def run_ladder(recipe: str, pairs: Sequence[str], options: LadderOptions, *, out: Path, log: LogFn) -> LadderReport:
    """Run a ladder below the folder `out`, or go on with it."""
    plan = make_ladder_plan(recipe, pairs, options)
    folder, ledger = out / plan.experiment, Ledger(out / "ledger.jsonl", log)
    folder.mkdir(parents=True, exist_ok=True)
    flops = sum(rung.flops for rung in plan.rungs) * plan.seeds
    log(
        f"ladder {plan.experiment}: {len(plan.rungs)} sizes x {plan.seeds} seeds, {flops:.2e} FLOPs; the model itself "
        f"has {plan.target.parameters:,} parameters and costs {plan.target.flops:.2e}"
    )
    with exclusive_pool(folder, options.jobs, "the same ladder is running; wait, or read its ledger") as pool:
        result = Ladder(plan, out, pool, ledger, log).run()
        atomic_write_json(folder / "result.json", result)
        write_ladder_page(result, folder / "report.html")
    return LadderReport(result, folder, ledger.file)


def make_ladder_plan(recipe: str, pairs: Sequence[str], options: LadderOptions) -> LadderPlan:
    """The plan. UsageError for wrong options, before anything runs."""
    if options.kind not in PARAMETRIZATIONS:
        raise UsageError(f"--parametrization {options.kind}: known are {', '.join(PARAMETRIZATIONS)}")
    if options.scale not in SCALES:
        raise UsageError(f"--scale {options.scale}: known are {', '.join(SCALES)}")
    if not recipe:
        raise UsageError("no recipe was given: quest ladder pretrain --rungs 5, for example")
    refuse_own_keys(pairs, allowed=("max_steps",))
    base = [*default_pairs(recipe, pairs), *pairs]
    config = load_recipe(recipe, base)[1]
    rungs, target = make_rungs(
        recipe, base, count=options.rungs, smallest=options.smallest, largest=options.largest, budgets=options.budgets,
        kind=options.kind, scale=options.scale,
    )  # fmt: skip
    return LadderPlan(
        recipe, tuple(base), tuple(rungs), target, options.kind, options.scale, own_code(), config.learning_rate,
        options.seeds, options.rates, options.tuned, options.run, command_line(),
    )  # fmt: skip


def parse_budgets(tokens_per_parameter: str, tokens: str) -> tuple[TokenBudget, ...]:
    """The values of --tokens-per-parameter (`5,10,20`) or of --tokens (`500k,1M,2M`); empty for none."""
    if tokens_per_parameter and tokens:
        raise UsageError("--tokens gives every size the same tokens, and --tokens-per-parameter larger sizes more: one")
    option, given = ("--tokens", tokens) if tokens else ("--tokens-per-parameter", tokens_per_parameter)
    amounts = sorted({parse_quantity(part, option) for part in given.split(",") if part.strip()})
    if len(amounts) == 2 or not all(amounts):
        raise UsageError(
            f"{option} {given}: give one number above 0, or at least three with commas, for a law of size and tokens"
        )
    return tuple(TokenBudget(amount, per_parameter=not tokens) for amount in amounts)
