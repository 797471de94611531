"""Runs a job in a run folder: one engine for every recipe, which knows none of them.

In the order of a run: processes and device, the job, its folder, optimizer and schedule, the loop, the outcome."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from llm_quest.contracts import Callback, LogFn, ParameterScale
from llm_quest.errors import ResourceError, UsageError
from llm_quest.files import atomic_write_json
from llm_quest.machine.hardware import peak_memory_bytes
from llm_quest.models.build import count_parameters, family_of
from llm_quest.progress import LineLogger, Logger, NullLogger, is_terminal, phase
from llm_quest.recipes.auto import CompileTimer, SlowStepNotice
from llm_quest.recipes.config import load_raw_config, parse_recorded_config
from llm_quest.recipes.config_schema import RunConfig
from llm_quest.recipes.freezing import freeze_parameters
from llm_quest.recipes.recipe import Context, Job, Recipe, RunOutcome
from llm_quest.recipes.run_folder import (
    describe_new_length,
    open_run_dir,
    remove_if_refused,
    require_matching_run,
    write_run_files,
)
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.train.arguments import TrainingArguments, TrainResult
from llm_quest.train.checkpoint import SHARDS_DIR, list_checkpoints
from llm_quest.train.loop import train
from llm_quest.train.optimizers import NO_SCALES, OPTIMIZERS, LRSchedule, make_lr_schedule
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import derive_seed


def run_recipe(
    recipe: Recipe,
    config: RunConfig,
    settings: RawConfig,
    folder: Path,
    *,
    resume: str = "auto",
    accept: Sequence[str] = (),
    env: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    log: LogFn = print,
) -> RunOutcome:
    """Run a recipe in a folder, or resume the run that is there. Every process of a torchrun calls this."""
    with remove_if_refused(folder), init_distributed(config, config.rows_per_step) as parallel:
        log = log if parallel.is_main_process else lambda text: None
        context = Context(folder, parallel, log, settings, resume, tuple(accept), dict(env or {}), quiet)
        if recipe.run is not None:
            return recipe.run(config, context)
        with phase("preparing"):
            job = recipe.build(config, context)
        return run_job(job, context, callbacks)


def run_job(job: Job, context: Context, callbacks: Sequence[Callback] = ()) -> RunOutcome:
    """Train an assembled job in its run folder. callbacks: called after the job's own."""
    config, folder, parallel = job.config, context.run_dir, context.parallel
    parameters = count_parameters(job.model)
    context.log(
        f"model: {family_of(job.model.config).name}-style, {parameters:,} parameters, {describe_place(context)}"
    )
    require_matching_run(config, folder, context.accept)
    log_new_length(job, folder, context.log)
    if config.freeze:
        freeze_parameters(job.model, config.freeze, context.log)
    with phase("preparing the reference"):
        save_prepared = job.prepare()
    with phase("evaluating before the first step"):
        before = job.before() if parallel.broadcast(is_new_run(context)) else {}
    parallel.parallelize(job.objective, list(job.model.blocks if job.blocks is None else job.blocks))
    optimizer = build_optimizer(config, job.model, job.adamw_parameters, job.parameter_scales)
    logger = make_display(job, folder, parallel, context.quiet)
    with open_run_dir(job, context) as run:
        if parallel.is_main_process:
            write_run_files(job, folder)
            save_prepared(folder)
            if before:
                run.log_event("evaluated", step=0, **before)
        result = train(
            job.objective,
            job.loader,
            optimizer,
            job.lr_schedule or build_lr_schedule(config),
            train_settings(config, expected_loss=job.expected_loss, watch_loss=job.watch_loss),
            run,
            parallel=parallel,
            callbacks=[*job.callbacks, *callbacks, *compile_timers(config, parallel), *slow_step_notices(context)],
            evaluators=job.evaluators,
            watchers=job.watchers,
            logger=logger,
        )
        with phase("evaluating after the last step"):
            for line in job.finish(result):
                context.log(line)
                run.log_event("result", message=line)
        finished = parallel.is_main_process and result.status == "finished"
        baselines = job.baselines() if finished and job.with_baselines else {}
    if finished:
        consolidate_last_checkpoint(result, context.log)
    return finish_run(config, folder, result, parameters, is_main_process=parallel.is_main_process, baselines=baselines)


def log_new_length(job: Job, folder: Path, log: LogFn) -> None:
    """Log what changes if a run is resumed with another number of steps."""
    if list_checkpoints(folder / "checkpoints"):
        before = parse_recorded_config(type(job.config), load_raw_config(str(folder / "config.yaml")))
        if before.max_steps != job.config.max_steps:
            schedules = build_lr_schedule(before), build_lr_schedule(job.config)
            describe_new_length(folder, before.max_steps, job.config.max_steps, schedules, log)


def is_new_run(context: Context) -> bool:
    """Whether the run starts at its first step."""
    return context.resume in ("auto", "never") and not list_checkpoints(context.run_dir / "checkpoints")


def compile_timers(config: RunConfig, parallel: DistributedContext) -> list[Callback]:
    """The callback that measures the time of compiling, in a list; empty for a run that is not compiled on the CPU."""
    return [CompileTimer()] if config.compile and parallel.is_main_process and parallel.device.type == "cpu" else []


def slow_step_notices(context: Context) -> list[Callback]:
    """The callback that notices busy cores, in a list; empty for one thread, several processes or a GPU."""
    alone = context.parallel.world_size == 1 and context.parallel.device.type == "cpu"
    return [SlowStepNotice(context.log)] if alone and torch.get_num_threads() > 1 else []


def consolidate_last_checkpoint(result: TrainResult, log: LogFn) -> None:
    """Convert a last checkpoint in shards (FSDP2) to the plain form, which all commands read."""
    if not (Path(result.checkpoint_path) / SHARDS_DIR).is_dir():
        return
    from llm_quest.train.sharded_checkpoint import consolidate_checkpoint

    try:
        consolidate_checkpoint(Path(result.checkpoint_path))
    except ResourceError as error:
        log(str(error))


def describe_place(context: Context) -> str:
    """The device, and how several processes share the work."""
    parallel = context.parallel
    shared = f", {parallel.world_size} processes by {parallel.strategy}" if parallel.world_size > 1 else ""
    return f"on {parallel.device}{shared}"


@contextmanager
def init_distributed(config: RunConfig, batch_size: int) -> Iterator[DistributedContext]:
    """Set the number of threads and join the other processes of a run, until the context ends. batch_size: rows of a
    step, over all processes."""
    if config.threads:
        torch.set_num_threads(config.threads)
    parallel = DistributedContext.from_environment(config.device, config.parallel)
    try:
        with parallel.share_failures():
            if batch_size % parallel.world_size:
                raise UsageError(
                    f"a batch of {batch_size} rows can't be shared by {parallel.world_size} processes; make it a "
                    "multiple"
                )
            yield parallel
    finally:
        parallel.destroy_process_group()


def build_optimizer(
    config: RunConfig,
    model: Any,
    adamw_parameters: Sequence[str] = ("embed.", "head."),
    scales: Mapping[str, ParameterScale] = NO_SCALES,
) -> torch.optim.Optimizer:
    """Build AdamW or Muon for the trainable parameters. adamw_parameters: name prefixes that Muon leaves to AdamW.
    scales: of a parametrization."""
    common: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.adam_betas,
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
        "scales": scales,
    }
    if config.optim == "muon":
        common |= {
            "row_splits": model.row_splits(),
            "adamw_prefixes": adamw_parameters,
            "momentum": config.muon_momentum,
            "form": "" if config.muon_form == "auto" else config.muon_form,
        }
    return OPTIMIZERS[config.optim](model, **common)


def build_lr_schedule(config: RunConfig) -> LRSchedule:
    """The multiplier of the peak rate at each step."""
    return make_lr_schedule(
        config.max_steps,
        warmup_steps=config.warmup_steps,
        shape=config.lr_scheduler_type,
        min_lr_ratio=config.min_lr_ratio,
        decay_fraction=config.lr_decay_ratio,
    )


def train_settings(
    config: RunConfig, *, expected_loss: float | None = None, watch_loss: bool = True
) -> TrainingArguments:
    """The arguments of the training loop from a config without `auto`: fields of the same name, and those that
    differ."""
    shared = {field.name for field in fields(TrainingArguments)} & type(config).model_fields.keys()
    differing: dict[str, Any] = {
        "save_seconds": 60 * config.save_minutes,
        "metric_for_best_model": config.metric_for_best_model or "",
        "compile": bool(config.compile),
        "max_seconds": config.max_seconds,
        "seed": derive_seed(config.seed, "dropout"),
        "expected_loss": expected_loss,
        "watch_loss": watch_loss,
    }
    return TrainingArguments(**{name: getattr(config, name) for name in shared} | differing)


def make_logger(rank: int = 0, *, quiet: bool = False, unit: str = "tokens") -> Logger:
    """Make the logger for stderr: a bar on a terminal, lines elsewhere; none for ranks other than 0."""
    if quiet or rank:
        return NullLogger()
    if not is_terminal(sys.stderr):
        return LineLogger(rank, unit)
    from llm_quest.train.terminal_display import BarLogger

    return BarLogger(unit)


def make_display(job: Job, folder: Path, parallel: DistributedContext, quiet: bool) -> Logger:
    """The progress display, and the trackers that the run reports to."""
    screen = make_logger(parallel.rank, quiet=quiet, unit=job.facts.get("counted", "tokens"))
    if not job.config.trackers or not parallel.is_main_process:
        return screen
    from llm_quest.train.trackers import TrackedLogger

    return TrackedLogger(screen, job.config.trackers, folder, job.config.model_dump(mode="json"))


def finish_run(
    config: RunConfig,
    folder: Path,
    result: TrainResult,
    parameters: int,
    *,
    is_main_process: bool,
    baselines: Mapping[str, float] | None = None,
) -> RunOutcome:
    """Make the outcome of a run and write it to summary.json in its folder."""
    outcome = RunOutcome(
        run=str(folder),
        status=result.status,
        step=result.step,
        steps=config.max_steps,
        exit_code=result.exit_code,
        parameters=parameters,
        seconds=result.seconds,
        tokens_per_second=result.tokens_per_second,
        metrics=dict(result.metrics),
        peak_memory_bytes=peak_memory_bytes(),
        baselines=baselines or {},
    )
    if is_main_process:
        atomic_write_json(folder / "summary.json", outcome.as_json())
    return outcome
