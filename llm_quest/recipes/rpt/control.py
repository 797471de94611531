"""`quest train rpt_control rpt_run=RUN`: what RPT has to be compared with. Its start goes on with plain next-token training
on the same documents for as many FLOPs as RPT took, its places searched and its samples drawn included.

A step of n documents of T tokens costs three forward passes over T each (`cost/flops.py`); the run ends with the first
step that reaches what RPT spent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from llm_quest.contracts import Evaluator
from llm_quest.cost.flops import ModelCost, PassCost
from llm_quest.data.loader import ShardedLoader, epoch_indices
from llm_quest.data.whole_documents import WholeDocuments
from llm_quest.errors import DataError, UsageError
from llm_quest.files import atomic_write_text
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.recipes.auto import resolve_precision
from llm_quest.recipes.config import config_to_yaml, load_raw_config, parse_config
from llm_quest.recipes.finetuning import StartModelConfig
from llm_quest.recipes.job import TrainingJob, apply_config_techniques, load_for_finetuning, run_job
from llm_quest.recipes.policy import LogFn
from llm_quest.recipes.recipe import Context, Recipe, no_single_job
from llm_quest.recipes.rpt.config import RptConfig, RptControlConfig
from llm_quest.recipes.rpt.flops_meter import TERA
from llm_quest.recipes.rpt.passages import RptDocuments, SelectedPositions, load_documents, load_positions
from llm_quest.recipes.rpt.probe import TABLES_FILE, PositionEvaluator
from llm_quest.recipes.rpt.recipe import RptJob, make_position_evaluation
from llm_quest.recipes.rpt.start_model import start_model_path
from llm_quest.recipes.run import RunOutcome, require_matching_run
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir
from llm_quest.train.state_dict import derive_seed


def run_rpt_control(config: RptControlConfig, context: Context) -> RunOutcome:
    """Run the recipe in a folder."""
    log, parallel, out = context.log, context.parallel, context.run_dir
    rpt, teraflops = load_rpt_run(config.rpt_run)
    chosen = resolve_precision(config.precision, parallel.device).value
    config = config.model_copy(update={"precision": chosen, "compile": config.compile is True})
    config, control_job = build_rpt_control_job(config, context.settings, rpt, teraflops, out, parallel, log)
    control_job.evaluator.report_table("before", log)
    outcome = run_job(control_job.job, config, out, context.resume, context.env, context.quiet, log, parallel)
    if outcome.status == "finished":
        control_job.evaluator.report_table("after", log)
    return outcome


def load_rpt_run(run: str) -> tuple[RptConfig, float]:
    """The RPT run's settings, and what it spent."""
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"rpt_run={run} is no run folder; train one first: quest train rpt --out {run}")
    found = load_raw_config(str(folder / "config.yaml"))  # the folder may have the name of a recipe
    if found.tree.get("recipe") != "rpt":
        raise UsageError(f"{run} is a run of the recipe {found.tree.get('recipe')}; give one of rpt")
    summary = folder / "summary.json"
    told = json.loads(summary.read_text()) if summary.is_file() else {}
    if told.get("status") != "finished":
        raise UsageError(f"{run} is not finished, so what it takes is not known: quest train {run}")
    return parse_config(RptConfig, found), float(told["metrics"]["teraflops"])


def build_rpt_control_job(
    config: RptControlConfig,
    settings: RawConfig,
    rpt: RptConfig,
    teraflops: float,
    out: Path,
    parallel: DistributedContext,
    log: LogFn,
) -> tuple[RptControlConfig, RptJob]:
    """The config with its steps, which the compute decides; model, documents, objective."""
    model, tokenizer = load_for_finetuning(StartModelConfig(load=start_model_path(rpt, Path(config.rpt_run))))
    model.to(parallel.device)
    text = load_documents(rpt, tokenizer, model.config.max_position_embeddings, parallel, log)
    positions = load_positions(Path(config.rpt_run), {"documents": text.hash})
    if positions is None:
        raise DataError(f"the places of {config.rpt_run} belong to another text than its config names; train it anew")
    technique_callbacks = apply_config_techniques(config, model, log)
    loader = documents_loader(config, text, positions, parallel)
    flops_counter = FlopsCallback(loader, ModelCost(model))
    config = set_max_steps(config, settings, flops_counter, teraflops)
    log(f"compute: {teraflops:.4g} teraflops of RPT are {config.max_steps:,} steps of {config.batch_size} documents")
    require_matching_run(config, out)
    if parallel.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out / "config.yaml", config_to_yaml(config))
    evaluation = make_position_evaluation(rpt, model, tokenizer, text, positions, parallel)
    evaluator = PositionEvaluator(
        evaluation, model, config.eval_steps, out / TABLES_FILE if parallel.is_main_process else None
    )

    def probes(run: RunDir) -> Sequence[Evaluator]:
        evaluator.samples = run.samples if run.is_main_process else None
        return [evaluator]

    facts = {"source": rpt.data.source, **positions.facts, "tokenizer_sha256": tokenizer.hash, "rpt": config.rpt_run}
    identity = {"documents": text.hash}
    return config, RptJob(
        TrainingJob(
            NextTokenLoss(model), loader, probes, tokenizer, facts, identity, [*technique_callbacks, flops_counter]
        ),
        evaluator,
    )


def documents_loader(
    config: RptControlConfig, text: RptDocuments, found: SelectedPositions, parallel: DistributedContext
) -> ShardedLoader[WholeDocuments]:
    """The documents that RPT thought about, each whole."""
    places: dict[int, list[int]] = {}
    for one in found.train:
        places.setdefault(one.document, []).append(one.place)
    numbers = sorted(places)
    source = WholeDocuments(
        [text.train[number] for number in numbers],
        target_positions=[places[number] for number in numbers] if config.targets == "selected" else None,
        max_micro_batch_tokens=config.micro_batch_tokens,
    )
    return ShardedLoader(
        source,
        batch_size=config.batch_size,
        micro_batch_size=config.batch_size,
        seed=derive_seed(config.seed, "order"),
        shard=parallel.data_shard,
    )


class FlopsCallback:
    """A callback that tells what has been spent, over all processes. `at(step)` is a function of the step alone."""

    def __init__(self, loader: ShardedLoader[WholeDocuments], cost: PassCost):
        self.feed, self.cost = loader, cost
        self.sums = [0.0]

    def flops_after(self, step: int) -> float:
        """FLOPs after so many steps."""
        while len(self.sums) <= step:
            first = (len(self.sums) - 1) * self.feed.batch_size
            documents, rows = self.feed.source.documents, range(first, first + self.feed.batch_size)
            lengths = [len(documents[i]) - 1 for i in epoch_indices(len(documents), self.feed.seed, rows)]
            self.sums.append(self.sums[-1] + sum(map(self.cost.training, lengths)))
        return self.sums[step]

    def on_step_end(self, model: nn.Module, step: int) -> Mapping[str, float]:
        return {"teraflops": self.flops_after(step) / TERA}

    def on_step_skipped(self, model: nn.Module) -> None:
        """Nothing is kept between steps: a refused one has been paid for like the others."""


def set_max_steps(
    config: RptControlConfig, settings: RawConfig, flops_counter: FlopsCallback, teraflops: float
) -> RptControlConfig:
    """As many steps as the compute allows for. UsageError where another number was asked for."""
    steps = 1
    while flops_counter.flops_after(steps) < teraflops * TERA:
        steps += 1
    if "max_steps" in settings.tree and config.max_steps != steps:
        raise UsageError(
            f"max_steps follows from what {config.rpt_run} spent and is {steps:,}, not {config.max_steps:,}: leave it out"
        )
    warmup = min(config.warmup_steps, steps)
    return config.model_copy(update={"max_steps": steps, "warmup_steps": warmup})


RECIPE = Recipe("rpt_control", RptControlConfig, no_single_job, run=run_rpt_control)
