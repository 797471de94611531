"""What the recipes have in common that go on from a model: it is opened with its tokenizer, conversations are read and
held apart, and the loop runs in a run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from llm_quest.contracts import Callback, Evaluator, Loader, MetricsCallback
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.files import atomic_write_json
from llm_quest.hub.load_save import write_model_json
from llm_quest.models.build import count_parameters, family_of
from llm_quest.recipes.auto import resolve_precision
from llm_quest.recipes.config_schema import RunConfig
from llm_quest.recipes.finetuning import (
    apply_config_techniques as apply_config_techniques,
)
from llm_quest.recipes.finetuning import (
    can_share_prompts as can_share_prompts,
)
from llm_quest.recipes.finetuning import (
    load_for_finetuning as load_for_finetuning,
)
from llm_quest.recipes.run import (
    RunOutcome,
    build_lr_schedule,
    build_optimizer,
    finish_run,
    make_display,
    open_run_dir,
    require_matching_run,
    train_settings,
)
from llm_quest.train.loop import train
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir

LogFn = Callable[[str], None]


@dataclass(frozen=True)
class TrainingJob:
    """What a recipe has assembled. make_evaluators: made when the run folder is there. facts: what the report tells
    about the data. identity: name -> hash of what a run may not change. prepare_whole_model: the work to be done while
    the model is whole; what it returns is called with the run folder, once that is there."""

    objective: nn.Module
    loader: Loader
    make_evaluators: Callable[[RunDir], Sequence[Evaluator]]
    tokenizer: Tokenizer
    facts: Mapping[str, Any]
    identity: Mapping[str, str]
    callbacks: Sequence[Callback] = field(default=())
    prepare_whole_model: Callable[[], Callable[[Path], None]] = lambda: lambda folder: None
    watchers: Sequence[MetricsCallback] = field(default=())

    @property
    def model(self) -> Any:
        return self.objective.model


def run_job(
    job: TrainingJob, config: RunConfig, folder: Path, resume: str, env: Mapping[str, Any], quiet: bool, log: LogFn,
    parallel: DistributedContext,
) -> RunOutcome:  # fmt: skip
    """The loop over an assembled job, in a run folder."""
    chosen = resolve_precision(config.precision, parallel.device)
    config = config.model_copy(update={"precision": chosen.value, "compile": config.compile is True})
    parameters = count_parameters(job.model)
    log(f"model: {family_of(job.model.config).name}-style, {parameters:,} parameters, on {parallel.device}")
    log(f"precision: {chosen.value} ({chosen.reason}); compiled: {'yes' if config.compile else 'no'}")
    require_matching_run(config, folder)
    keep = job.prepare_whole_model()
    parallel.parallelize(job.objective, list(job.model.blocks))
    identity = {"tokenizer": job.tokenizer.hash, **job.identity}
    with open_run_dir(config, folder, parallel, identity, env, resume) as run:
        if parallel.is_main_process:
            write_model_json(folder, job.model)
            job.tokenizer.save(folder / "tokenizer", model_max_length=job.model.config.max_position_embeddings)
            atomic_write_json(folder / "data.json", dict(job.facts))
            keep(folder)
        result = train(
            job.objective,
            job.loader,
            build_optimizer(config, job.model),
            build_lr_schedule(config),
            train_settings(config),
            run,
            parallel=parallel,
            callbacks=job.callbacks,
            evaluators=job.make_evaluators(run),
            watchers=job.watchers,
            logger=make_display(config, folder, parallel, quiet),
        )
    return finish_run(config, folder, result, parameters, leader=parallel.is_main_process)
