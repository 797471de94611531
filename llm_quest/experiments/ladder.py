"""Runs a ladder from its claim to its outcome: `quest ladder`.

    claim (ledger) ─► the rates, tuned on two rungs ─► all rungs, every seed ─► law and leave-one-out ─►
    prediction (ledger, before the large run) ─► with --run the large run ─► how far it was (ledger)

Nothing but finished runs is kept between the parts: the same command goes on after kill -9 and ends with the same
result."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quest.contracts import LogFn
from llm_quest.errors import GuardStop
from llm_quest.experiments.code_tree import CodeTree
from llm_quest.experiments.ledger import Ledger
from llm_quest.experiments.measurements import TUNING_SEEDS, Measurements, Record, RunRequest, hash_inputs, read_metric
from llm_quest.experiments.rungs import Rung
from llm_quest.experiments.scaling_law import (
    LadderPoint,
    fit_scaling_law,
    has_paired_seeds,
    leave_one_out,
    noise_of,
    numbers_of_form,
    predict_loss,
    seed_effects,
)
from llm_quest.experiments.tuning import RateSearch, carry_rate, describe_search, first_grid, needs_extension
from llm_quest.experiments.worker_pool import WorkerPool

METRIC = "eval/loss"


@dataclass(frozen=True)
class LadderPlan:
    """The settings of a ladder. rates: learning rates tried on each tuned rung (1: the recipe's own). tuned: how many
    rungs are tuned: the smallest, and the middle one. run: how many large runs are made after the prediction."""

    recipe: str
    pairs: tuple[str, ...]
    rungs: tuple[Rung, ...]
    target: Rung
    kind: str
    scale: str
    code: CodeTree
    learning_rate: float
    seeds: int = 2
    rates: int = 3
    tuned: int = 2
    run: int = 0
    command: str = ""

    def content(self) -> dict[str, Any]:
        """The settings that are fixed before the first run. `run` is not part of it: the large run may be made
        later."""
        return {
            "question": f"What loss does {self.target.name} reach, by {len(self.rungs)} smaller sizes?",
            "recipe": self.recipe, "settings": list(self.pairs), "code": self.code.hash,
            "parametrization": self.kind, "scale": self.scale, "seeds": self.seeds, "rates": self.rates,
            "tuned": self.tuned,
            "rungs": [describe_rung(rung) for rung in self.rungs], "target": describe_rung(self.target),
        }  # fmt: skip

    @property
    def rungs_to_tune(self) -> list[Rung]:
        """The rungs whose rate is tuned: the smallest and the middle one, of the largest budget."""
        rungs = [rung for rung in self.rungs if rung.budget == self.target.budget]
        return [rungs[0], rungs[len(rungs) // 2]][: self.tuned]

    @property
    def experiment(self) -> str:
        text = json.dumps(self.content(), sort_keys=True)
        return f"ladder-{Path(self.recipe).stem}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def describe_rung(rung: Rung) -> dict[str, Any]:
    """A rung as JSON values."""
    return {
        "name": rung.name, "parameters": rung.parameters, "multiplying": rung.n, "budget": asdict(rung.budget),
        "steps": rung.steps, "tokens": rung.tokens, "flops": rung.flops, "settings": list(rung.pairs),
    }  # fmt: skip


class Ladder:
    """Runs a plan below the folder `root`."""

    def __init__(self, plan: LadderPlan, root: Path, pool: WorkerPool, ledger: Ledger, log: LogFn):
        self.plan, self.root, self.pool, self.ledger, self.log = plan, root, pool, ledger, log
        self.folder = root / plan.experiment
        self.tuned: dict[float, float] = {}
        self.searches: dict[str, RateSearch] = {}
        self.notes: list[str] = []

    def run(self) -> dict[str, Any]:
        """Run the plan; the result as JSON values."""
        self.ledger.append("claim", self.plan.experiment, {**self.plan.content(), "command": self.plan.command})
        about = self.describe()
        self.vocab_size = about["vocab_size"]
        self.measurements = Measurements(
            self.plan.recipe, self.root, self.pool, self.ledger, self.plan.experiment,
            hash_inputs(about),
        )  # fmt: skip
        self.tune()
        losses = self.losses_of(self.plan.rungs, self.plan.seeds, "rung")
        points = [LadderPoint(rung.n, rung.tokens, tuple(losses[rung.name])) for rung in self.plan.rungs]
        result = self.fit(points, losses)
        sentence = describe_prediction(result)
        self.log(sentence)
        row = {"sentence": sentence, "prediction": result["prediction"], "law": result["law"]}
        self.ledger.append("prediction", self.plan.experiment, {**row, "command": self.plan.command})
        if self.plan.run:
            result |= self.compare(result)
        return result

    def describe(self) -> dict[str, Any]:
        """The description of the smallest rung, which has the hash of the data."""
        request = {"do": "describe", "recipe": self.plan.recipe, "pairs": self.settings_of(self.plan.rungs[0])}
        return self.pool.submit(self.plan.code, request).result()

    def rate_of(self, rung: Rung) -> float:
        """The learning rate of a rung: the recipe's own, or carried from the tuned ones."""
        return carry_rate(rung.n, self.tuned) if self.tuned else self.plan.learning_rate

    def settings_of(self, rung: Rung, rate: float = 0.0) -> list[str]:
        return [*self.plan.pairs, *rung.pairs, f"learning_rate={rate or self.rate_of(rung):g}"]

    def request(self, rung: Rung, seed: int, role: str, rate: float = 0.0) -> RunRequest:
        return RunRequest(rung.name, tuple(self.settings_of(rung, rate)), seed, self.plan.code, role)

    def value(self, record: Record, name: str, metric: str = METRIC) -> float | None:
        return read_metric(record, metric, name, self.vocab_size)

    def tune(self) -> None:
        """The learning rates of the smallest rung and of the middle one. The parametrization carries a rate over sizes;
        what is left is that runs of larger sizes are longer, which the second rung measures."""
        if self.plan.rates < 2:
            self.note(f"the learning rate is the recipe's, {self.plan.learning_rate:g}, and was not tuned")
            return
        center, tuned = self.plan.learning_rate, {}
        for rung in self.plan.rungs_to_tune:
            search = self.search_rate(rung, center)
            tuned[float(rung.n)] = center = search.choose()
            self.log(describe_search(rung.name, search))
        self.tuned = tuned

    def search_rate(self, rung: Rung, center: float) -> RateSearch:
        """The losses of a rung at several rates, on a seed that no rung reports."""
        search = self.searches[rung.name] = RateSearch()
        rates = first_grid(center, self.plan.rates)
        while rates:
            requests = [self.request(rung, TUNING_SEEDS[0], "tune", rate) for rate in rates]
            records = self.measurements.measure(requests, f"tuning {rung.name} parameters")
            for rate, record in zip(rates, records, strict=True):
                loss = self.value(record, rung.name)
                search.losses[rate] = float("inf") if loss is None else loss
            rates = [search.next_rate()] if needs_extension({rung.name: search}, self.plan.rates) else []
        return search

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.log(text)

    def losses_of(self, rungs: Sequence[Rung], seeds: int, role: str) -> dict[str, list[float]]:
        """The losses of each size by its name, all runs side by side. The longest begin first, so that no process
        waits for one of them in the end."""
        order = sorted(rungs, key=lambda rung: -rung.flops)
        requests = [self.request(rung, seed, role) for rung in order for seed in range(1, seeds + 1)]
        records = iter(self.measurements.measure(requests, f"{len(rungs)} sizes" if len(rungs) > 1 else order[0].name))
        records_of = {rung.name: [next(records) for _ in range(seeds)] for rung in order}
        return {rung.name: self.losses_of_size(rung, records_of[rung.name]) for rung in rungs}

    def losses_of_size(self, rung: Rung, records: Sequence[Record]) -> list[float]:
        """The losses of a size, and a line of the live table. GuardStop if a run diverged."""
        losses = [self.value(record, rung.name) for record in records]
        if None in losses:
            raise GuardStop(
                f"{rung.name} diverged at the learning rate {self.rate_of(rung):g}, carried from the tuned sizes, so "
                "no law goes through it: give a lower learning_rate with --rates 1, or --parametrization completep"
            )
        finite = [loss for loss in losses if loss is not None]
        shown = "  ".join(f"{loss:.4f}" for loss in finite)
        self.log(f"{rung.name:>10}  {rung.parameters:>10,} parameters  {rung.flops:.2e} FLOPs  loss {shown}")
        return finite

    def fit(self, points: Sequence[LadderPoint], losses: Mapping[str, list[float]]) -> dict[str, Any]:
        """Law, leave-one-out and prediction."""
        law, form = fit_scaling_law(points), numbers_of_form(points)
        target, runs = self.plan.target, max(1, self.plan.run)
        paired = has_paired_seeds(points) and runs <= self.plan.seeds
        prediction = predict_loss(points, target.n, target.tokens, runs=runs, form=form, paired=paired)
        left_out = leave_one_out(points)
        covered = sum(one.covers(point.mean) for one, point in zip(left_out, points, strict=True))
        if law.floor <= 0:
            self.note("the law has no floor above 0: the sizes are too small to see one, and larger sizes may flatten")
        sd, freedom = noise_of(points, law, form, paired=paired)
        rungs = [
            {**describe_rung(rung), "learning_rate": self.rate_of(rung), "losses": losses[rung.name],
             "predicted_by_others": asdict(one),
             "covered": one.covers(point.mean), "fitted": law.predict(rung.n, rung.tokens)}
            for rung, point, one in zip(self.plan.rungs, points, left_out, strict=True)
        ]  # fmt: skip
        return {
            **self.plan.content(), "experiment": self.plan.experiment, "command": self.plan.command,
            "metric": METRIC, "law": {**asdict(law), "formula": law.formula},
            "rates_tried": {name: {f"{rate:g}": loss for rate, loss in search.losses.items()}
                            for name, search in self.searches.items()},
            "run_sd": sd, "degrees_of_freedom": freedom, "seed_effects": seed_effects(points) if paired else [],
            "rungs": rungs, "covered": covered,
            "largest_error": left_out[-1].loss / points[-1].mean - 1,
            "prediction": asdict(prediction), "measured": None, "notes": self.notes,
        }  # fmt: skip

    def compare(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Make the large runs, and say how far the prediction was."""
        target = self.plan.target
        losses = self.losses_of([target], self.plan.run, "target")[target.name]
        mean, prediction = statistics.fmean(losses), result["prediction"]
        outcome = {
            "losses": losses, "mean": mean, "error": prediction["loss"] - mean,
            "relative_error": prediction["loss"] / mean - 1,
            "covered": prediction["low"] <= mean <= prediction["high"],
        }  # fmt: skip
        sentence = describe_outcome(target.name, prediction, outcome)
        self.log(sentence)
        row = {"sentence": sentence, "measured": outcome, "command": self.plan.command}
        self.ledger.append("outcome", self.plan.experiment, row)
        return {"measured": outcome}


def describe_prediction(result: Mapping[str, Any]) -> str:
    """The prediction in a sentence."""
    prediction, target, sizes = result["prediction"], result["target"], len(result["rungs"])
    return (
        f"{target['name']}: predicted {METRIC} {prediction['loss']:.4f} "
        f"({prediction['low']:.4f} to {prediction['high']:.4f}) after "
        f"{target['tokens']:,} tokens{describe_seeds(result)}; leave-one-out intervals hold {result['covered']} of "
        f"{sizes} sizes; the largest rung, predicted from the others, is {result['largest_error']:+.1%} off"
    )


def describe_seeds(result: Mapping[str, Any]) -> str:
    """For which seeds the prediction holds, where their effects are part of it."""
    runs = result["prediction"]["runs"]
    return (" with seed 1" if runs == 1 else f" with seeds 1 to {runs}") if result["seed_effects"] else ""


def describe_outcome(name: str, prediction: Mapping[str, Any], outcome: Mapping[str, Any]) -> str:
    """The error of the prediction in a sentence."""
    inside = "inside" if outcome["covered"] else "outside"
    return (
        f"{name}: measured {outcome['mean']:.4f}, predicted {prediction['loss']:.4f}: {outcome['error']:+.4f} "
        f"({outcome['relative_error']:+.1%}), {inside} the interval"
    )
