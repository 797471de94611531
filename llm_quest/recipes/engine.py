"""Runs a job in a run folder: one engine for every recipe. It knows no recipe, and no recipe knows it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llm_quest.contracts import Callback
from llm_quest.errors import DataError, MissingError, UsageError
from llm_quest.files import atomic_write_json
from llm_quest.hub.load_save import write_model_json
from llm_quest.models.build import count_parameters, family_of
from llm_quest.recipes.config_schema import RunConfig
from llm_quest.recipes.recipe import Context, Job, LogFn, Recipe
from llm_quest.recipes.run import (
    RunOutcome,
    build_lr_schedule,
    build_optimizer,
    finish_run,
    init_distributed,
    make_display,
    open_run_dir,
    require_matching_run,
    train_settings,
)
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.train.loop import train

REFUSALS = (UsageError, DataError, MissingError)


def run_recipe(
    recipe: Recipe,
    config: RunConfig,
    settings: RawConfig,
    folder: Path,
    *,
    resume: str = "auto",
    env: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    log: LogFn = print,
) -> RunOutcome:
    """Run a recipe in a folder, or resume the run that is there. Every process of a torchrun calls this."""
    with remove_if_refused(folder), init_distributed(config, config.rows_per_step) as parallel:
        log = log if parallel.is_main_process else lambda text: None
        context = Context(folder, parallel, log, settings, resume, dict(env or {}), quiet)
        if recipe.run is not None:
            return recipe.run(config, context)
        return run_job(recipe.build(config, context), context, callbacks)


@contextmanager
def open_job(recipe: Recipe, config: RunConfig, settings: RawConfig, log: LogFn, folder: Path) -> Iterator[Job]:
    """A job on this process alone, to count its cost or to look at its batches. folder: an empty one to use."""
    with init_distributed(config, 1) as parallel:
        yield recipe.build(config, Context(folder, parallel, log, settings, planning=True))


def run_job(job: Job, context: Context, callbacks: Sequence[Callback] = ()) -> RunOutcome:
    """The loop over an assembled job, in its run folder. callbacks: after the job's own."""
    config, folder, parallel = job.config, context.run_dir, context.parallel
    parameters = count_parameters(job.model)
    context.log(
        f"model: {family_of(job.model.config).name}-style, {parameters:,} parameters, {describe_place(context)}"
    )
    require_matching_run(config, folder)
    save_prepared = job.prepare()
    parallel.parallelize(job.objective, list(job.model.blocks if job.blocks is None else job.blocks))
    optimizer = build_optimizer(config, job.model, job.adamw_parameters)
    with open_run_dir(config, folder, parallel, job.identity, context.env, context.resume) as run:
        if parallel.is_main_process:
            write_run_files(job, folder)
            save_prepared(folder)
        result = train(
            job.objective,
            job.loader,
            optimizer,
            job.lr_schedule or build_lr_schedule(config),
            train_settings(config, expected_loss=job.expected_loss),
            run,
            parallel=parallel,
            callbacks=[*job.callbacks, *callbacks],
            evaluators=job.evaluators,
            watchers=job.watchers,
            logger=make_display(config, folder, parallel, context.quiet),
        )
        baselines = job.finish(result)
    return finish_run(config, folder, result, parameters, leader=parallel.is_main_process, baselines=baselines)


def describe_place(context: Context) -> str:
    """The device, and how several processes share the work."""
    parallel = context.parallel
    shared = f", {parallel.world_size} processes by {parallel.strategy}" if parallel.world_size > 1 else ""
    return f"on {parallel.device}{shared}"


def write_run_files(job: Job, folder: Path) -> None:
    """What loading, exporting and the report need beside the checkpoints."""
    write_model_json(folder, job.model)
    if job.tokenizer is not None:
        job.tokenizer.save(folder / "tokenizer", model_max_length=job.model.config.max_position_embeddings)
    if job.preprocessor is not None:
        atomic_write_json(folder / "preprocessor_config.json", job.preprocessor.to_preprocessor_config())
    atomic_write_json(folder / "data.json", dict(job.facts))


@contextmanager
def remove_if_refused(folder: Path) -> Iterator[None]:
    """A run that is refused leaves no new folder, unless it holds a checkpoint by then (of a warm-up)."""
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        yield
    except REFUSALS:
        leader = os.environ.get("RANK", "0") == "0"
        if leader and folder in new and not any(folder.rglob("step-*")):
            shutil.rmtree(folder, ignore_errors=True)
            for parent in new[1:]:
                with suppress(OSError):  # something else is in it by now
                    parent.rmdir()
        raise
