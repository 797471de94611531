"""Runs an experiment from its claim to its verdicts: `quest ablate`.

    claim (ledger) ─► what the arms begin with and cost ─► equal budgets ─► equal tuning ─► A/A pairs ─► pairs until
    every arm is decided ─► verdicts (ledger), result.json, report.html

Nothing but finished runs is kept between the parts, and every part follows from them: the same command goes on after
kill -9 and ends with the same result."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quest.contracts import LogFn
from llm_quest.errors import GuardStop, UsageError
from llm_quest.experiments import sequential
from llm_quest.experiments.arm_tuning import ArmTuning, why_untuned
from llm_quest.experiments.arms import CONTROL, DEV, Arm
from llm_quest.experiments.bases import Base, BaseRuns
from llm_quest.experiments.budgets import budget_pairs, shared_weights
from llm_quest.experiments.comparison import Claim, Comparison
from llm_quest.experiments.derived_settings import (
    Derived,
    describe_derived,
    describe_fixed,
    find_derived_settings,
    flat_settings,
    settings_unlike_control,
)
from llm_quest.experiments.ledger import Ledger
from llm_quest.experiments.measurements import (
    Measurements,
    OutOfTime,
    Record,
    RunRequest,
    hash_inputs,
    read_metric,
)
from llm_quest.experiments.noise import measure_noise
from llm_quest.experiments.run_costs import FinishedRuns, RunCounts, announce_cost, count_runs, find_finished_runs
from llm_quest.experiments.tuning import RateSearch
from llm_quest.experiments.verdict_lines import pair_line
from llm_quest.experiments.worker_pool import WorkerPool
from llm_quest.progress import phase

UNIGRAM_MARGIN = 0.05
"""An arm whose loss is within so many nats of that of token frequencies alone has not used its context."""

CONFIRMATION_ERRORS = (
    "an effect that is not there is declared in at most 5 % of confirmations, and a difference of exactly delta is "
    "called none in at most 5 %; an undecided one refutes nothing"
)


@dataclass(frozen=True)
class ExperimentPlan:
    """The settings of an experiment. pairs: the control's settings. rates, tuning_seeds: how many learning rates each
    arm tries, on how many seeds (one rate: no tuning). aa_pairs: pairs of the control with itself. first_seed: of the
    reported ones. secondary: metrics that are described. bases: runs that arms begin from, in their order. confirms:
    the experiment whose verdicts are asked once more, confirms_outcomes: its (arm, outcome)."""

    recipe: str
    pairs: tuple[str, ...]
    arms: tuple[Arm, ...]
    control: Arm
    claim: Claim
    budget: str = "flops"
    rates: int = 3
    tuning_seeds: int = 2
    aa_pairs: int = 3
    first_seed: int = 1
    secondary: tuple[str, ...] = ()
    question: str = ""
    command: str = ""
    bases: tuple[Base, ...] = ()
    confirms: str = ""
    confirms_outcomes: tuple[tuple[str, str], ...] = ()

    def content(self) -> dict[str, Any]:
        """The settings that are fixed before the first run, as JSON values."""
        arms = {arm.name: arm_to_json(arm) for arm in (self.control, *self.arms)}
        return {
            "question": self.question, "recipe": self.recipe, "settings": list(self.pairs), "arms": arms,
            "claim": asdict(self.claim), "budget": self.budget, "rates": self.rates,
            "tuning_seeds": self.tuning_seeds, "aa_pairs": self.aa_pairs, "first_seed": self.first_seed,
            "secondary": list(self.secondary), "bases": [asdict(base) for base in self.bases],
            **({"confirms": self.confirms} if self.confirms else {}),
        }  # fmt: skip

    def same_but_seeds(self, claim: Mapping[str, Any]) -> bool:
        """Whether a claim of the ledger asks the same of other seeds."""
        content = json.loads(json.dumps(self.content()))
        fixed = {key: value for key, value in content.items() if key not in ("question", "first_seed")}
        return claim.get("first_seed") != self.first_seed and all(
            claim.get(key) == value for key, value in fixed.items()
        )

    @property
    def counts(self) -> RunCounts:
        """How many runs the plan has, if no arm is equal to the control."""
        return self.count_runs(1 + len(self.arms))

    def count_runs(self, arms: int) -> RunCounts:
        """The runs of so many arms, the control among them."""
        return count_runs(arms, self.rates, self.tuning_seeds, self.aa_pairs, self.claim.cap, len(self.bases))

    @property
    def experiment(self) -> str:
        """The name of the experiment: the recipe, and a hash of all that is fixed."""
        text = json.dumps(self.content(), sort_keys=True)
        return f"{Path(self.recipe).stem}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def arm_to_json(arm: Arm) -> dict[str, Any]:
    """An arm as JSON values."""
    return {"settings": list(arm.pairs), "code": arm.code.hash} | ({"metric": arm.metric} if arm.metric else {})


class Experiment:
    """Runs a plan. root: the folder of all experiments and of their runs. deadline: of `time.monotonic`, after which no
    run is begun: OutOfTime before the first pairs, "undecided (time)" after them. records: the folder whose finished
    runs the estimate leaves out; `root`, where it is not given.

    command: the command line that began the experiment, which a resumed one keeps."""

    def __init__(
        self,
        plan: ExperimentPlan,
        root: Path,
        pool: WorkerPool,
        ledger: Ledger,
        log: LogFn,
        *,
        deadline: float = math.inf,
        records: Path | None = None,
    ):
        self.plan, self.root, self.pool, self.ledger, self.log = plan, root, pool, ledger, log
        self.deadline, self.records, self.command = deadline, records or root, plan.command
        self.finished = FinishedRuns()
        bases = Measurements(plan.recipe, root, pool, ledger, plan.experiment, "", deadline)
        self.base_runs = BaseRuns(plan.bases, bases, plan.control.code)
        self.folder = root / plan.experiment
        self.arms = {arm.name: arm for arm in (plan.control, *plan.arms)}
        self.searches: dict[str, RateSearch] = {}
        self.costs: dict[str, list[Record]] = {name: [] for name in self.arms}
        self.notes: list[str] = []
        self.derived: dict[str, Derived] = {}

    def run(self) -> dict[str, Any]:
        """Run the plan; the result as JSON values."""
        self.prepare()
        self.tune()
        noise = measure_noise(self) if self.plan.aa_pairs else {}
        comparison = self.compare()
        result = self.result(comparison, noise)
        for verdict in result["verdicts"]:
            self.ledger.append("verdict", self.plan.experiment, {**verdict, "command": self.command})
        return result

    def prepare(self) -> None:
        """All that comes before the first run."""
        self.write_claim()
        self.prepare_runs()

    def write_claim(self) -> None:
        """Announce the settings and write the claim to the ledger."""
        self.announce_settings()
        claim = self.ledger.append(
            "claim", self.plan.experiment,
            {**self.plan.content(), "command": self.plan.command, "resolved": self.resolve_arms(),
             "derived": self.derived},
        )  # fmt: skip
        self.command = claim["command"]
        self.link_repetitions()

    def prepare_runs(self) -> None:
        """Describe the arms, give them their budgets, and say what the runs cost."""
        self.describe()
        self.measurements = Measurements(
            self.plan.recipe, self.root, self.pool, self.ledger, self.plan.experiment,
            hash_inputs(self.descriptions[CONTROL]), self.deadline,
        )  # fmt: skip
        self.arm_pairs = self.equal_budgets()
        self.finished = find_finished_runs(self)
        announce_cost(self)

    def note(self, text: str) -> None:
        """A remark that the result keeps."""
        self.notes.append(text)
        self.log(text)

    def announce_settings(self) -> None:
        """Say what no one gave and what is not the recipe's own, before the claim is written."""
        for name, arm in self.arms.items():
            self.derived[name] = find_derived_settings(self.plan.recipe, (*self.plan.pairs, *arm.pairs))
        for line in describe_derived(Path(self.plan.recipe).stem, self.derived):
            self.note(line)
        if fixed := describe_fixed(self.derived[CONTROL]):
            self.log(fixed)

    def resolve_arms(self) -> dict[str, dict[str, Any]]:
        """All settings of the control; of an arm those that differ from them."""
        resolved = {n: flat_settings(self.plan.recipe, (*self.plan.pairs, *arm.pairs)) for n, arm in self.arms.items()}
        control = resolved[CONTROL]
        return {
            name: settings if name == CONTROL else settings_unlike_control(settings, control)
            for name, settings in resolved.items()
        }

    def link_repetitions(self) -> None:
        """Name the earlier experiments that asked the same of other seeds, in both directions."""
        me = self.plan.experiment
        for row in itertools.takewhile(lambda row: row["experiment"] != me, self.ledger.rows()):
            if row["kind"] == "claim" and self.plan.same_but_seeds(row):
                other = f"; quest ablate --confirm {row['experiment']} does" if DEV in self.plan.pairs else ""
                self.note(
                    f"a repetition of {row['experiment']} with other seeds on the same held-out data, which confirms "
                    f"nothing{other}"
                )
                sentence = f"repeated with seeds from {self.plan.first_seed}, not confirmed: {me}"
                self.ledger.append("repetition", row["experiment"], {"sentence": sentence, "by": me})

    def num_steps(self, name: str) -> int:
        """The number of an arm's steps, which its budget gives."""
        return next(int(p.partition("=")[2]) for p in reversed(self.arm_pairs[name]) if p.startswith("max_steps="))

    def describe(self) -> None:
        """Describe each arm before anything is trained: its data, first weights and cost."""
        message = {"do": "describe", "recipe": self.plan.recipe}
        seed = self.plan.first_seed
        self.base_runs.train([seed])
        futures = {
            name: self.pool.submit(
                arm.code,
                {
                    **message,
                    "pairs": [*self.base_runs.fill_in((*self.plan.pairs, *arm.pairs), seed), f"seed={seed}"],
                    "measure": self.plan.budget == "seconds",
                    "estimate": name == CONTROL,
                },
            )
            for name, arm in self.arms.items()
        }
        with phase("looking at the arms, timing steps", len(futures)) as now:
            self.descriptions: dict[str, dict[str, Any]] = {}
            now.detail = lambda: ", ".join(name for name in futures if name not in self.descriptions)
            for name, future in futures.items():
                self.descriptions[name] = future.result()
                now.done += 1
        control = self.descriptions[CONTROL]
        self.drop_equal_arms()
        for name in self.open_names:
            arm = self.descriptions[name]
            if arm["identity"] != control["identity"] and self.plan.claim.metric in ("eval/loss", "eval/perplexity"):
                raise UsageError(
                    f"{name} has other tokens than the control, so {self.plan.claim.metric} can't be compared; use "
                    "--metric eval/bits_per_byte"
                )
            same = "the same order of data" if arm["order"] == control["order"] else "another order of data"
            self.log(f"{name}: {shared_weights(arm, control):.0%} of its first weights are the control's, {same}")
        self.announce_opened_settings()

    def announce_opened_settings(self) -> None:
        """Say what changed when the arms were opened, because of their data and models."""
        for name, about in self.descriptions.items():
            for key, (before, after) in about["changed_settings"].items():
                why = "changed when its data and model were read"
                self.derived[name][key] = {"recipe": before, "value": after, "why": why}
                self.note(f"{name}: {key} is {after}, not {before} ({why})")

    @property
    def counts(self) -> RunCounts:
        """How many runs there are, without those of arms that were dropped."""
        return self.plan.count_runs(len(self.arms))

    @property
    def open_names(self) -> list[str]:
        """The arms that are compared with the control."""
        return [name for name in self.arms if name != CONTROL]

    def drop_equal_arms(self) -> None:
        """Leave out arms that compute what the control does: their settings are its own, spelled out."""
        control = self.descriptions[CONTROL]["computes"], self.arms[CONTROL].code.hash
        for name in self.open_names:
            same = (self.descriptions[name]["computes"], self.arms[name].code.hash) == control
            if same and not self.arms[name].metric:
                self.note(f"{name} changes nothing: its settings are the control's; not run")
                del self.arms[name], self.descriptions[name], self.costs[name]
        if not self.open_names:
            raise UsageError("no arm differs from the control: there is nothing to compare")

    def equal_budgets(self) -> dict[str, tuple[str, ...]]:
        """The settings of each arm with the number of steps that its budget gives."""
        arm_pairs, control = {}, self.descriptions[CONTROL]
        for name, arm in self.arms.items():
            budget = budget_pairs(self.plan.budget, self.descriptions[name], control, name)
            arm_pairs[name] = (*self.plan.pairs, *arm.pairs, *budget)
            flops = self.descriptions[name].get("flops_per_step")
            steps, warmup = (int(pair.partition("=")[2]) for pair in budget)
            counted = f", {flops * steps:.3g} FLOPs" if flops else ""
            parameters = self.descriptions[name]["parameters"]
            self.log(f"{name}: {parameters:,} parameters, {steps} steps, {warmup} of them warm-up{counted}")
            self.announce_budget(name, {"max_steps": steps, "warmup_steps": warmup})
        return arm_pairs

    def announce_budget(self, name: str, lengths: Mapping[str, int]) -> None:
        """Say which lengths the budget has changed."""
        for key, value in lengths.items():
            if value != (before := self.descriptions[name][key]):
                why = f"equal {self.plan.budget}"
                self.derived[name][key] = {"recipe": before, "value": value, "why": why}
                self.note(f"{name}: {key} is {value}, not {before} ({why})")

    def request(self, name: str, seed: int, role: str, extra: Sequence[str] = (), repeat: int = 0) -> RunRequest:
        pairs = self.base_runs.fill_in((*self.arm_pairs[name], *extra), seed)
        data = hash_inputs(self.descriptions[name])
        return RunRequest(name, pairs, seed, self.arms[name].code, role, repeat, data=data)

    def measure(self, requests: Sequence[RunRequest], what: str) -> list[Record]:
        return list(self.measure_each(requests, what))

    def measure_each(self, requests: Sequence[RunRequest], what: str) -> Iterator[Record]:
        """Each record as soon as it and those before it are there."""
        self.base_runs.train(sorted({request.seed for request in requests}))
        for request, record in zip(requests, self.measurements.measure_each(requests, what), strict=True):
            self.costs[request.arm].append({"role": request.role, **record})
            yield record

    def value(self, record: Record, name: str, metric: str = "") -> float | None:
        vocab_size = self.descriptions[name]["vocab_size"]
        return read_metric(record, metric or self.arms[name].metric or self.plan.claim.metric, name, vocab_size)

    def value_on_scale(self, record: Record, name: str) -> float | None:
        """The claim's metric of a run on the claim's scale; None if it diverged."""
        value = self.value(record, name)
        return None if value is None else self.plan.claim.rescale(value)

    def tune(self) -> None:
        """Give each arm its learning rate."""
        if reason := why_untuned(self):
            self.note(reason)
            return
        self.searches = ArmTuning(self).run()
        for name, search in self.searches.items():
            self.arm_pairs[name] = (*self.arm_pairs[name], f"learning_rate={search.choose():g}")

    def compare(self) -> Comparison:
        """Pairs in the order of their seeds, until every arm is decided or the cap is reached."""
        claim = self.plan.claim
        comparison = Comparison(claim, self.open_names)
        self.reported: dict[str, list[tuple[int, Record]]] = {name: [] for name in self.arms}
        seeds = iter(range(self.plan.first_seed, self.plan.first_seed + claim.cap))
        while comparison.open_arms and comparison.pairs < claim.cap:
            names = [CONTROL, *comparison.open_arms]
            count = sequential.FIRST_LOOK if comparison.pairs == 0 else max(1, self.pool.jobs // len(names))
            chosen = list(itertools.islice(seeds, count))
            requests = [self.request(name, seed, "report") for seed in chosen for name in names]
            try:
                records = self.measure_each(requests, "runs of pairs")
                for seed in chosen:
                    self.add_pair(comparison, seed, {name: next(records) for name in names})
                next(records, None)
            except OutOfTime:
                if comparison.pairs == 0:
                    raise
                for name in comparison.open_arms:
                    comparison.arms[name].outcome = "undecided (time)"
                break
        return comparison

    def add_pair(self, comparison: Comparison, seed: int, records: Mapping[str, Record]) -> None:
        """One pair, and a line for each arm that it adds to. A pair behind the decision is left out."""
        if not comparison.open_arms:
            return
        names = comparison.open_arms
        values = {name: self.value_on_scale(records[name], name) for name in (CONTROL, *names)}
        if values[CONTROL] is None and self.searches:
            raise GuardStop(
                f"the control diverged with seed {seed} at its tuned learning rate, so the experiment is void: give a "
                "lower learning_rate and fresh seeds (--first-seed)"
            )
        for name in (CONTROL, *names):
            self.reported[name].append((seed, records[name]))
        comparison.add_pair(seed, values[CONTROL], values)
        self.refuse_unlearned(comparison, names)
        for name in names:
            self.log(pair_line(comparison, name, seed))

    def refuse_unlearned(self, comparison: Comparison, names: Sequence[str]) -> None:
        """Void arms: those that predict no better than the frequencies of tokens after the first look."""
        if comparison.pairs < sequential.FIRST_LOOK:
            return
        for name in names:
            arm = comparison.arms[name]
            for who, values in ((name, arm.arm), (CONTROL, arm.control)):
                if values and self.is_unlearned(min(values)):
                    unigram = self.descriptions[CONTROL]["unigram_loss"]
                    arm.outcome = "invalid"
                    arm.reason = (
                        f"{who} never used its context: its loss is that of token frequencies, {unigram:.3f}; give "
                        "more steps (max_steps)"
                    )

    def is_unlearned(self, value: float) -> bool:
        """Whether a loss, on the claim's scale, is that of token frequencies alone, or worse."""
        unigram, claim = self.descriptions[CONTROL]["unigram_loss"], self.plan.claim
        return unigram is not None and claim.metric == "eval/loss" and value > claim.rescale(unigram - UNIGRAM_MARGIN)

    def result(self, comparison: Comparison, noise: Mapping[str, Any]) -> dict[str, Any]:
        """The whole result. Times are left to the records, so that a resumed experiment ends with the same bytes."""
        verdicts = [{**comparison.verdict(name), **self.provenance(name)} for name in comparison.arms]
        confirmed = self.compare_outcomes(comparison)
        return {
            "experiment": self.plan.experiment, **self.plan.content(), "command": self.command,
            "verdicts": verdicts, "noise": dict(noise), "notes": self.notes, "derived": self.derived,
            "arms_measured": {name: self.summarize_arm(name) for name in self.arms},
            **({"confirmed": confirmed} if confirmed else {}),
        }  # fmt: skip

    def compare_outcomes(self, comparison: Comparison) -> dict[str, dict[str, Any]]:
        """Whether each verdict of the experiment that this one confirms came again."""
        outcomes = {
            arm: {"before": before, "again": comparison.arms[arm].outcome}
            for arm, before in self.plan.confirms_outcomes if arm in comparison.arms
        }  # fmt: skip
        for arm, one in outcomes.items():
            same = one["before"] == one["again"]
            word = "the same verdict again" if same else "not the same verdict"
            self.note(f"{arm}: {word}: {one['before']} in {self.plan.confirms}, {one['again']} here")
        if outcomes:
            self.note(CONFIRMATION_ERRORS)
        return {arm: {**outcome, "same": outcome["before"] == outcome["again"]} for arm, outcome in outcomes.items()}

    def provenance(self, name: str) -> dict[str, Any]:
        """The runs that a verdict rests on, and the secondary metrics."""
        runs = {
            who: [self.measurements.fingerprint(self.request(who, seed, "report")) for seed, _ in self.reported[who]]
            for who in (name, CONTROL)
        }
        rates = {who: self.learning_rate(who) for who in (name, CONTROL)}
        return {
            "runs": runs, "secondary": dict(self.secondary(name)), "budget": self.plan.budget, "learning_rates": rates,
        }  # fmt: skip

    def learning_rate(self, name: str) -> float:
        """The rate that an arm was tuned to, or was given."""
        search = self.searches.get(name)
        return search.choose() if search else float(self.descriptions[name]["learning_rate"])

    def secondary(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Differences in the other metrics, which describe and decide nothing."""
        control = dict(self.reported[CONTROL])
        for metric in self.plan.secondary:
            pairs = [
                (self.value(r, name, metric), self.value(control[s], CONTROL, metric)) for s, r in self.reported[name]
            ]
            d = [a - c for a, c in pairs if a is not None and c is not None]
            low, high = sequential.sequential_interval(d, self.plan.claim.cap)
            bounded = math.isfinite(low) and math.isfinite(high)
            yield metric, {"mean": statistics.fmean(d) if d else None, "interval_95": [low, high] if bounded else None}

    def summarize_arm(self, name: str) -> dict[str, Any]:
        """The settings, cost, tuned rate and values of an arm."""
        about, search = self.descriptions[name], self.searches.get(name)
        steps = self.num_steps(name)
        flops, losses = about.get("flops_per_step"), search.losses if search else {}
        return {
            "settings": list(self.arm_pairs[name]), "code": self.arms[name].code.hash,
            "revision": self.arms[name].code.revision, "parameters": about["parameters"], "steps": steps,
            "flops": flops * steps if flops else None,
            "shared_weights": shared_weights(about, self.descriptions[CONTROL]),
            "same_data_order": about["order"] == self.descriptions[CONTROL]["order"],
            "rates": {f"{rate:g}": loss if math.isfinite(loss) else "diverged" for rate, loss in losses.items()},
            "learning_rate": self.learning_rate(name),
            "values": [self.value(record, name) for _, record in self.reported[name]],
        }  # fmt: skip
