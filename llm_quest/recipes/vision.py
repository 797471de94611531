"""What the two recipes that look have in common: a run folder, the loop, and an outcome with held-out scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_quest.contracts import Feed, Probe
from llm_quest.data.images import Preprocess
from llm_quest.disk import replace_json
from llm_quest.errors import BusyError, UsageError
from llm_quest.hub.files import write_model_json
from llm_quest.models.build import count_parameters, page_of
from llm_quest.recipes import seeds
from llm_quest.recipes.choices import precision
from llm_quest.recipes.config import as_yaml, differences, gather, resolve
from llm_quest.recipes.vision_config import FREE, Course, ImageRows
from llm_quest.train.checkpoint import listed
from llm_quest.train.log import Board, display
from llm_quest.train.loop import train
from llm_quest.train.optimizers import adamw, muon
from llm_quest.train.parallel import Parallel
from llm_quest.train.run import Run, finite
from llm_quest.train.schedule import schedule
from llm_quest.train.settings import Settings

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and what it reached. scores: on what was held out."""

    run: str
    status: str
    step: int
    steps: int
    exit_code: int
    parameters: int
    seconds: float
    metrics: Mapping[str, Any]
    scores: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For the screen."""
        told = [
            f"{self.status} at step {self.step} of {self.steps}, {self.parameters:,} parameters, "
            f"{self.seconds:.0f} s: {self.run}"
        ]
        if self.scores:
            told.append("held out: " + ", ".join(f"{name} {value:.4g}" for name, value in self.scores.items()))
        if self.status != "finished":
            told.append(f"go on with: quest train {self.run}")
        return told


@dataclass(frozen=True)
class Job:
    """What a recipe has assembled. identity: name -> hash of what a run may not change; by_adamw: what Muon leaves to
    AdamW."""

    objective: nn.Module
    feed: Feed
    probe: Probe
    preprocess: Preprocess
    identity: Mapping[str, str]
    by_adamw: Sequence[str] = ("embed.", "head.")

    @property
    def model(self) -> Any:
        return self.objective.model


def prepared(config: Course, micro: ImageRows, run: Callable[[Parallel], Outcome]) -> Outcome:
    """Threads, device and the other processes, for as long as a run takes."""
    if config.threads:
        torch.set_num_threads(config.threads)
    parallel = Parallel.from_environment(config.device, config.parallel)
    try:
        if micro.rows % parallel.world:
            raise UsageError(
                f"batch.rows {micro.rows} can't be shared by {parallel.world} processes; make it a multiple of that"
            )
        return run(parallel)
    finally:
        parallel.close()


def carried_out(
    job: Job,
    config: Course,
    folder: Path,
    resume: str,
    env: Mapping[str, Any],
    quiet: bool,
    say: Say,
    parallel: Parallel,
) -> Outcome:
    """The loop over an assembled job, in a run folder."""
    chosen = precision(config.precision, parallel.device)
    config = config.model_copy(update={"precision": chosen.value})
    parameters = count_parameters(job.model)
    say(f"model: {page_of(job.model.config).name}-style, {parameters:,} parameters, on {parallel.device}")
    say(f"precision: {chosen.value} ({chosen.why}); compiled: {'yes' if config.compile else 'no'}")
    require_same_run(config, folder)
    parallel.place(job.objective, blocks(job.model))
    identity = dict(job.identity)
    screen = display(parallel.rank, quiet=quiet)
    if config.tensorboard and parallel.leader:
        screen = Board(folder / "tensorboard", screen)
    with Run(
        folder,
        config=as_yaml(config),
        env={**env, "hashes": identity},
        identity=identity,
        resume=resume,
        leader=parallel.leader,
    ) as run:
        if parallel.leader:
            write_model_json(folder, job.model)
            replace_json(folder / "preprocessor_config.json", job.preprocess.publish())
        result = train(
            job.objective,
            job.feed,
            optimizer(config, job),
            schedule(config.steps, **config.schedule.model_dump()),
            loop_settings(config),
            run,
            parallel=parallel,
            probes=[job.probe],
            display=screen,
        )
    scores = {name.removeprefix("eval/"): value for name, value in result.metrics.items() if name.startswith("eval/")}
    outcome = Outcome(
        run=str(folder),
        status=result.status,
        step=result.step,
        steps=config.steps,
        exit_code=result.exit_code,
        parameters=parameters,
        seconds=result.seconds,
        metrics=dict(result.metrics),
        scores=scores,
    )
    if parallel.leader:
        replace_json(folder / "summary.json", finite(outcome.as_json()))
    return outcome


def blocks(model: Any) -> list[nn.Module]:
    """What FSDP shards one by one: every block of every part."""
    return [block for name, part in model.named_modules() if name.endswith("blocks") for block in part]


def optimizer(config: Course, job: Job) -> torch.optim.Optimizer:
    """AdamW or Muon over what is trained; Muon is told which rows are matrices of their own."""
    part = config.optimizer
    common: dict[str, Any] = {"lr": part.lr, "betas": part.betas, "eps": part.eps, "weight_decay": part.weight_decay}
    if part.name == "adamw":
        return adamw(job.model, **common)
    return muon(job.model, splits=job.model.row_splits(), by_adamw=job.by_adamw, momentum=part.momentum, **common)


def loop_settings(config: Course) -> Settings:
    """The engine's view of the config."""
    return Settings(
        steps=config.steps,
        clip=config.clip,
        log_every=config.log_every,
        save_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        precision=config.precision,
        compile=config.compile,
        max_time=config.seconds,
        seed=seeds.stream(config.seed, "dropout"),
    )


def require_same_run(config: Course, folder: Path) -> None:
    """A folder that holds something else, or a run of other settings, is left alone."""
    old = folder / "config.yaml"
    if not old.is_file():
        if folder.is_dir() and any(entry.name != "run.lock" for entry in folder.iterdir()):
            raise UsageError(f"{folder} is not empty and no run; choose another --out")
    elif listed(folder / "checkpoints"):
        settings = gather(str(old))
        if settings.tree.get("recipe") != config.recipe:  # type: ignore[attr-defined]
            raise BusyError(
                f"{folder} holds a run of another recipe ({settings.tree.get('recipe')}); choose another --out"
            )
        changed = differences(resolve(type(config), settings), config, FREE)
        if changed:
            raise BusyError(
                f"{folder} holds a run of other settings ({'; '.join(changed[:6])}).\n"
                f"Go on with its own (quest train {folder}) or choose another --out"
            )
