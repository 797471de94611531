"""`quest ablate`: compares arms of a recipe with a control, until a sequential test decides."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

from llm_quest.cli.output import command_line
from llm_quest.contracts import LogFn
from llm_quest.errors import UsageError
from llm_quest.experiments.arms import CONTROL, DEV, TEST, Arm, default_pairs, parse_arms, refuse_own_keys, resolve_arms
from llm_quest.experiments.budgets import BUDGETS
from llm_quest.experiments.code_tree import own_code
from llm_quest.experiments.comparison import Claim, Scale, scale_delta
from llm_quest.experiments.confirmation import has_halves, plan_confirmation
from llm_quest.experiments.experiment import Experiment, ExperimentPlan
from llm_quest.experiments.ledger import Ledger
from llm_quest.experiments.measurements import require_reported_seeds
from llm_quest.experiments.page import write_experiment_page
from llm_quest.experiments.run_costs import RunCounts, estimate_arm_seconds, estimate_seconds
from llm_quest.experiments.sequential import FIRST_LOOK, THRESHOLDS
from llm_quest.experiments.verdict_lines import describe_verdict
from llm_quest.experiments.worker_pool import WorkerPool, exclusive_pool
from llm_quest.files import atomic_write_json
from llm_quest.progress import phase
from llm_quest.recipes.recipe import load_recipe
from llm_quest.train.best_model import is_greater_better

POLICIES = ("grpo", "iterative", "rpt", "rpt_control")
DEFAULT_METRICS = {**dict.fromkeys(POLICIES, "eval/accuracy"), "vit": "eval/accuracy", "vlm": "eval/loss"}
DEFAULT_DELTA = 0.03
"""Nats, or a share: 3 points of accuracy."""
PROTOCOL = Path(__file__).parents[1] / "experiments" / "agents.md"


@dataclass(frozen=True)
class AblateOptions:
    """The options of `quest ablate`."""

    vary: Sequence[str] = ()
    arms: Sequence[str] = ()
    code: Sequence[str] = ()
    metrics: Sequence[str] = ()
    delta: float | None = None
    cap: int = 12
    budget: str = ""
    rates: int = 3
    tuning_seeds: int = 2
    aa_pairs: int = 3
    first_seed: int = 1
    question: str = ""
    jobs: int = 1
    confirm: str = ""
    scale: str = "linear"


@dataclass(frozen=True)
class AblationReport:
    """The result of an experiment and where its files are."""

    result: dict[str, Any]
    folder: Path
    ledger: Path

    def as_json(self) -> dict[str, Any]:
        return {**self.result, "folder": str(self.folder), "ledger": str(self.ledger)}

    def lines(self) -> list[str]:
        """The verdicts, what they cost, and what would repeat them."""
        lines = [line for verdict in self.result["verdicts"] for line in describe_verdict(verdict)]
        lines += describe_noise_beside(self.result)
        lines += [f"note: {text}" for text in self.result["notes"]]
        return [*lines, f"page: {self.folder / 'report.html'}", f"ledger: {self.ledger} ({self.result['experiment']})"]


@dataclass(frozen=True)
class AgentProtocol:
    """`quest ablate --for-agents`."""

    def lines(self) -> list[str]:
        return PROTOCOL.read_text(encoding="utf-8").splitlines()

    def as_json(self) -> dict[str, str]:
        return {"protocol": PROTOCOL.read_text(encoding="utf-8")}


def describe_noise_beside(result: Mapping[str, Any]) -> list[str]:
    """How much the pairs of each arm vary, beside the rounding noise of equal arms and the noise of other seeds."""
    noise = result["noise"]
    if not noise or noise["pair_sd"] is None or noise["run_sd"] is None:
        return []
    pairs = [f"{v['arm']} {v['standard_deviation']:.3g}" for v in result["verdicts"] if v["standard_deviation"]]
    return [
        f"standard deviations: differences of pairs: {', '.join(pairs) or '-'}; rounding noise (one seed, equal arms) "
        f"{noise['pair_sd']:.2g}; other seeds {noise['run_sd']:.3g}"
    ]


@dataclass(frozen=True)
class AblationPreview:
    """`quest ablate --dry-run`: what would run, and nothing that was written. resolved: all settings of the control,
    and of an arm those that differ. run_seconds: of a run of the control; seconds: of all runs that are not there yet,
    at least and at most; None where they cannot be timed beforehand."""

    experiment: str
    resolved: Mapping[str, Mapping[str, Any]]
    derived: Mapping[str, Mapping[str, Any]]
    messages: Sequence[str]
    runs: RunCounts
    run_seconds: float | None
    seconds: tuple[float, float] | None

    def as_json(self) -> dict[str, Any]:
        runs = {"least": self.runs.least, "most": self.runs.most}
        return {**asdict(self), "runs": {**asdict(self.runs), **runs}}

    def lines(self) -> list[str]:
        lines = [f"{self.experiment}: nothing was written", *self.messages]
        for name, settings in self.resolved.items():
            lines.append(f"settings of {name}{'' if name == CONTROL else ' where they are not those of the control'}:")
            lines += [f"  {key}={value}{describe_origin(self.derived[name], key)}" for key, value in settings.items()]
        return lines


def describe_origin(derived: Mapping[str, Mapping[str, Any]], key: str) -> str:
    one = derived.get(key)
    return f"   (the recipe has {one['recipe']}; {one['why']})" if one else ""


def preview_ablation(
    recipe: str, pairs: Sequence[str], options: AblateOptions, *, out: Path, log: LogFn
) -> AblationPreview:
    """What `run_ablation` would run: its ledger is a copy in a folder that is removed."""
    with tempfile.TemporaryDirectory() as temporary:
        root, messages = Path(temporary), list[str]()
        if (out / "ledger.jsonl").is_file():
            shutil.copyfile(out / "ledger.jsonl", root / "ledger.jsonl")
        ledger = Ledger(root / "ledger.jsonl", log)
        copies = root / "code" if options.code else out / "code"
        with phase("reading the settings and the package"):
            plan = plan_ablation(recipe, pairs, options, ledger, copies, messages.append)
        with WorkerPool(options.jobs) as pool:
            experiment = Experiment(plan, root, pool, ledger, messages.append, records=out)
            experiment.prepare()
        return AblationPreview(
            plan.experiment, experiment.resolve_arms(), experiment.derived, messages, experiment.counts,
            estimate_arm_seconds(experiment, CONTROL), estimate_seconds(experiment),
        )  # fmt: skip


def plan_ablation(
    recipe: str, pairs: Sequence[str], options: AblateOptions, ledger: Ledger, copies: Path, log: LogFn
) -> ExperimentPlan:
    """The plan of an experiment, or of a confirmation. copies: the folder for edited packages."""
    if not options.confirm:
        return make_plan(recipe, pairs, options, copies.parent, log)
    if recipe or pairs or options.vary or options.arms:
        raise UsageError(f"--confirm {options.confirm} asks the same again: leave recipe, settings and arms out")
    return plan_confirmation(ledger, options.confirm, options.code, copies, command_line())


def run_ablation(recipe: str, pairs: Sequence[str], options: AblateOptions, *, out: Path, log: LogFn) -> AblationReport:
    """Run an experiment below the folder `out`, or go on with it."""
    ledger = Ledger(out / "ledger.jsonl", log)
    with phase("reading the settings and the package"):
        plan = plan_ablation(recipe, pairs, options, ledger, out / "code", log)
    folder = out / plan.experiment
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_pool(folder, options.jobs, "the same experiment is running; wait, or read its ledger") as pool:
        log(f"experiment {plan.experiment}: {describe_plan(plan)}")
        result = Experiment(plan, out, pool, ledger, log).run()
        atomic_write_json(folder / "result.json", result)
        write_experiment_page(result, out, folder / "report.html")
    return AblationReport(result, folder, ledger.file)


def make_plan(recipe: str, pairs: Sequence[str], options: AblateOptions, out: Path, log: LogFn) -> ExperimentPlan:
    """The plan. UsageError for wrong options, before anything runs."""
    check_ablate_options(options)
    if not recipe:
        raise UsageError("no recipe was given: quest ablate pretrain --vary optim=adamw,muon, for example")
    refuse_own_keys(pairs, allowed=("max_steps",))
    if TEST in pairs:
        raise UsageError(f"{TEST}: the test half confirms what was found on the dev half: quest ablate --confirm NAME")
    base = [*default_pairs(recipe, pairs), *pairs]
    if not any(pair.startswith("data.eval_part=") for pair in pairs) and has_halves(recipe, base):
        base.append(DEV)
    recipe_spec, config, _ = load_recipe(recipe, base)
    if config.device not in ("auto", "cpu") or recipe_spec.run is not None:
        what = (
            f"device={config.device}" if recipe_spec.run is None else f"{recipe_spec.name} (a recipe of several runs)"
        )
        raise UsageError(f"quest ablate runs single jobs on the CPU; {what} is not one: compare its runs by hand")
    claim = make_claim(recipe_spec.name, options)
    arms = resolve_arms(recipe, base, parse_arms(options.vary, options.arms, options.code, out / "code"), log)
    if options.code and own_code().revision.endswith("+"):
        log("the package has uncommitted changes: the control and every patch run with them (git status)")
    budget = options.budget or ("steps" if recipe_spec.name in POLICIES else "flops")
    return ExperimentPlan(
        recipe, tuple(base), tuple(arms), Arm(CONTROL, (), own_code()), claim, budget,
        options.rates, options.tuning_seeds, options.aa_pairs, options.first_seed,
        tuple(options.metrics[1:]), options.question, command_line(),
    )  # fmt: skip


def check_ablate_options(options: AblateOptions) -> None:
    """UsageError for options that allow no verdict."""
    if options.cap < FIRST_LOOK:
        raise UsageError(
            f"--cap {options.cap}: {options.cap} pairs decide nothing; the first look is after {FIRST_LOOK}. "
            f"Take one of {', '.join(map(str, THRESHOLDS))}"
        )
    if options.cap not in THRESHOLDS:
        raise UsageError(f"--cap {options.cap}: thresholds are known for {', '.join(map(str, THRESHOLDS))} pairs")
    if options.budget and options.budget not in BUDGETS:
        raise UsageError(f"--budget {options.budget}: known are {', '.join(BUDGETS)}")
    if options.scale not in get_args(Scale):
        raise UsageError(f"--scale {options.scale}: known are {', '.join(get_args(Scale))}")
    if options.delta is not None and not options.delta > 0:
        raise UsageError(f"--delta {options.delta:g}: the smallest difference worth having is above 0")
    if options.scale == "log" and not (options.delta or 0.0) > 1:
        given = "--delta is missing" if options.delta is None else f"--delta {options.delta:g}"
        raise UsageError(f"{given}: with --scale log it is the smallest ratio worth having, above 1 (1.05: 5 %)")
    require_reported_seeds(options.first_seed, options.cap)


def make_claim(recipe: str, options: AblateOptions) -> Claim:
    """Metric, direction, delta, cap and scale."""
    metric = options.metrics[0] if options.metrics else DEFAULT_METRICS.get(recipe, "eval/loss")
    greater = is_greater_better(metric)
    if options.delta is None and not metric.endswith(("loss", "accuracy", "bits_per_byte")):
        raise UsageError(f"--delta is missing: the smallest difference of {metric} that is worth having, in its units")
    normal = not greater and recipe not in POLICIES
    scale = cast(Scale, options.scale)
    delta = scale_delta(DEFAULT_DELTA if options.delta is None else options.delta, scale)
    return Claim(metric, delta, options.cap, greater, normal, scale=scale)


def describe_plan(plan: ExperimentPlan) -> str:
    """The plan in a line: metric, delta, budget."""
    return f"{plan.claim.measure}, delta {plan.claim.delta:.3g}, equal {plan.budget}"
