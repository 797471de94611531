"""`quest train rpt_control rpt_run=RUN`: the control of RPT. Its start model is trained further by plain next-token
loss on the same documents, for as many FLOPs as RPT took, finding positions and sampling included.

A step of n documents of T tokens costs three forward passes over T each (`cost/flops.py`); the run ends with the first
step that reaches what RPT spent.

Commonly got wrong: the FLOPs of RPT include its search for places and its sampling; the control starts from the same
model after its warm-up."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from llm_quest.cost.flops import ModelCost, PassCost
from llm_quest.data.loader import ShardedLoader, epoch_indices
from llm_quest.data.whole_documents import WholeDocuments
from llm_quest.errors import DataError, UsageError
from llm_quest.files import damaged_file_errors, load_json
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.recipes.assembly import source_name
from llm_quest.recipes.auto import resolve_auto
from llm_quest.recipes.config import load_raw_config, parse_config
from llm_quest.recipes.config_schema import NonNegativeInt, PositiveInt, RunConfig
from llm_quest.recipes.diagnostics import SUPERVISED_SYMPTOMS
from llm_quest.recipes.finetuning import StartModelConfig, apply_config_techniques, load_for_finetuning
from llm_quest.recipes.recipe import Context, Job, Recipe
from llm_quest.recipes.reference_model import weights_hash
from llm_quest.recipes.rpt.documents import RptDocuments, load_documents
from llm_quest.recipes.rpt.evaluation import TABLES_FILE, PositionEvaluator
from llm_quest.recipes.rpt.positions import SelectedPositions, load_positions
from llm_quest.recipes.rpt.recipe import TERA, RptConfig, make_position_evaluation, report_after, report_before
from llm_quest.recipes.rpt.start_model import start_model_path
from llm_quest.recipes.run_folder import init_run_dir
from llm_quest.recipes.schema import LocalPath
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import derive_seed


class RptControlConfig(RunConfig):
    """The control of RPT: the same model trained further by plain next-token loss on the same documents, for as many
    FLOPs as an RPT run took."""

    recipe: Literal["rpt_control"]
    rpt_run: LocalPath = Field(min_length=1, description="the RPT run: its start model, documents, places, FLOPs")
    targets: Literal["all", "selected"] = Field(
        default="all", description="tokens of the loss: all, or those at the places of RPT"
    )
    batch_size: PositiveInt = Field(default=64, description="documents in an optimizer step, over all processes")
    micro_batch_tokens: PositiveInt = Field(default=8192, description="tokens in a micro-batch")
    eval_steps: NonNegativeInt = Field(default=50, description="steps between evaluations; 0: only at the end")

    @model_validator(mode="before")
    @classmethod
    def refuse_model(cls, given: Any) -> Any:
        """Raise ValueError for a model: it is the one that the RPT run started from."""
        if isinstance(given, dict) and "model" in given:
            raise ValueError("model has no effect: it is the one that rpt_run began with; leave it out")
        return given

    @property
    def rows_per_step(self) -> int:
        return self.batch_size


def build_rpt_control(config: RptControlConfig, context: Context) -> Job:
    """The RPT run's start, documents and positions; as many steps as its compute allows for."""
    parallel, log, out = context.parallel, context.log, context.run_dir
    rpt, teraflops = load_rpt_run(config.rpt_run)
    config = resolve_auto(config, context)
    model, tokenizer = load_for_finetuning(StartModelConfig(load=start_model_path(rpt, Path(config.rpt_run))))
    model.to(parallel.device)
    start = weights_hash(model)
    text = load_documents(rpt, tokenizer, model.config.max_position_embeddings, parallel, log)
    positions = load_positions(Path(config.rpt_run), {"documents": text.hash})
    if positions is None:
        raise DataError(f"the places of {config.rpt_run} belong to another text than its config names; train it anew")
    technique_callbacks = apply_config_techniques(config, model, log)
    loader = documents_loader(config, text, positions, parallel)
    flops_counter = FlopsCallback(loader, ModelCost(model))
    config = set_max_steps(config, context.settings, flops_counter, teraflops)
    log(f"compute: {teraflops:.4g} teraflops of RPT are {config.max_steps:,} steps of {config.batch_size} documents")
    if not context.planning:
        init_run_dir(config, context)
    objective = NextTokenLoss(model)
    whole_model = partial(parallel.gather_model, objective)
    evaluator = PositionEvaluator(
        make_position_evaluation(rpt, model, tokenizer, text, positions, parallel, whole_model),
        model,
        config.eval_steps,
        out / TABLES_FILE if context.samples_dir is not None else None,
        context.samples_dir,
    )
    return Job(
        config,
        objective,
        loader,
        [evaluator],
        {"tokenizer": tokenizer.hash, "documents": text.hash, "positions": positions.hash, "start": start},
        {"source": source_name(rpt.data), **positions.facts, "tokenizer_sha256": tokenizer.hash, "rpt": config.rpt_run},
        tokenizer,
        callbacks=[*technique_callbacks, flops_counter],
        watchers=[Diagnostics(symptoms=SUPERVISED_SYMPTOMS)],
        before=partial(report_before, evaluator, log),
        finish=partial(report_after, evaluator, log),
    )


def load_rpt_run(run: str) -> tuple[RptConfig, float]:
    """Load the RPT run's settings, and the teraflops it spent."""
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"rpt_run={run} is no run folder; train one first: quest train rpt --out {run}")
    raw_config = load_raw_config(str(folder / "config.yaml"))  # the folder may have the name of a recipe
    if raw_config.tree.get("recipe") != "rpt":
        raise UsageError(f"{run} is a run of the recipe {raw_config.tree.get('recipe')}; give one of rpt")
    summary = folder / "summary.json"
    remedy = f"train the run again, or finish it: quest train {run}"
    summary_json = load_json(summary, remedy=remedy) if summary.is_file() else {}
    if summary_json.get("status") != "finished":
        raise UsageError(f"{run} is not finished, so what it takes is not known: quest train {run}")
    with damaged_file_errors(summary, remedy):
        return parse_config(RptConfig, raw_config), float(summary_json["metrics"]["teraflops"])


def documents_loader(
    config: RptControlConfig, text: RptDocuments, selected: SelectedPositions, parallel: DistributedContext
) -> ShardedLoader[WholeDocuments]:
    """A loader of the documents with places of RPT, each whole."""
    places: dict[int, list[int]] = {}
    for one in selected.train:
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
    """Callback that reports the FLOPs spent so far, over all processes; a function of the step alone."""

    def __init__(self, loader: ShardedLoader[WholeDocuments], cost: PassCost):
        self.loader, self.cost = loader, cost
        self.sums = [0.0]

    def flops_after(self, step: int) -> float:
        """FLOPs after so many steps."""
        while len(self.sums) <= step:
            first = (len(self.sums) - 1) * self.loader.batch_size
            documents, rows = self.loader.source.documents, range(first, first + self.loader.batch_size)
            lengths = [len(documents[i]) - 1 for i in epoch_indices(len(documents), self.loader.seed, rows)]
            self.sums.append(self.sums[-1] + sum(map(self.cost.training, lengths)))
        return self.sums[step]

    def on_step_end(self, model: nn.Module, step: int) -> Mapping[str, float]:
        return {"teraflops": self.flops_after(step) / TERA}

    def on_step_skipped(self, model: nn.Module) -> None:
        """A skipped step costs as many FLOPs as another."""


def set_max_steps(
    config: RptControlConfig, settings: RawConfig, flops_counter: FlopsCallback, teraflops: float
) -> RptControlConfig:
    """Set max_steps to as many steps as the compute allows for. UsageError where another number was asked for."""
    steps = 1
    while flops_counter.flops_after(steps) < teraflops * TERA:
        steps += 1
    if "max_steps" in settings.tree and config.max_steps != steps:
        raise UsageError(
            f"max_steps follows from what {config.rpt_run} spent and is {steps:,}, not {config.max_steps:,}: leave it "
            "out"
        )
    warmup = min(config.warmup_steps, steps)
    return config.model_copy(update={"max_steps": steps, "warmup_steps": warmup})


RECIPE = Recipe("rpt_control", RptControlConfig, build_rpt_control)
