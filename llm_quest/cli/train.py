"""`quest train` and `quest plan`: from a recipe's name to a run folder with a report, or to what that would cost."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_quest.cli.doctor import inspect_machine
from llm_quest.cost.plan import TrainingPlan, TrainingWorkload, plan_training
from llm_quest.cost.plan_images import ImagePlan, plan_images
from llm_quest.cost.plan_policy import PolicyPlan, plan_policy
from llm_quest.cost.plan_tuning import TuningPlan, plan_tuning
from llm_quest.errors import UsageError
from llm_quest.files import atomic_write_json
from llm_quest.objectives.distillation import DistillationLoss
from llm_quest.recipes.auto import resolve_precision
from llm_quest.recipes.auxiliary_losses import build_distillation
from llm_quest.recipes.classify import ClassifyConfig
from llm_quest.recipes.config import (
    config_to_yaml,
)
from llm_quest.recipes.dpo import DpoConfig
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.grpo import GrpoConfig
from llm_quest.recipes.pretrain import PretrainConfig, resolve_model_config, resolve_vocab_size
from llm_quest.recipes.recipe import load_recipe
from llm_quest.recipes.reward import RewardConfig
from llm_quest.recipes.run import RunOutcome
from llm_quest.recipes.sft import SftConfig
from llm_quest.recipes.techniques import split_checkpointing
from llm_quest.recipes.vit import VitConfig
from llm_quest.recipes.vlm import VlmConfig
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.train.parallel import resolve_device

LogFn = Callable[[str], None]

MIN_STEPS_TO_MEASURE = 100
"""From so many steps on, three are run and timed before the run begins, so that its plan is not a guess."""


@dataclass(frozen=True)
class DryRunResult:
    """A config that passes all checks."""

    config: PretrainConfig
    exit_code: int = 0

    def as_json(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")

    def lines(self) -> list[str]:
        return config_to_yaml(self.config).splitlines()


def start_training(
    recipe: str,
    overrides: Sequence[str],
    *,
    out: Path | None,
    resume: str = "auto",
    dry_run: bool = False,
    quiet: bool = False,
    log: LogFn,
) -> RunOutcome | DryRunResult:
    """Train with a recipe: start a new run, or resume the one in the folder."""
    found, config, settings = load_recipe(recipe, overrides)
    if dry_run:
        found.check(config, settings)
        return DryRunResult(config)
    folder, resume = choose_run_dir(recipe, config, out, resume)
    env = inspect_machine(folder).as_json()
    outcome = run_recipe(found, config, settings, folder, resume=resume, env=env, quiet=quiet, log=log)
    if os.environ.get("RANK", "0") == "0":
        write_plan_and_report(folder, predict_cost(config, settings, folder), log)
    return outcome


def predict_cost(config: Any, settings: RawConfig, folder: Path) -> TrainingPlan | None:
    """The plan of a run of one process that has none, from counted FLOPs alone: nothing that the run measured is in it,
    so that the report compares a prediction. Made after the run, which does not wait for it."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not isinstance(config, PretrainConfig) or not alone or (folder / "plan.json").exists():
        return None
    workload = make_workload(config, resolve_model_config(config, settings))
    return plan_training(workload, measure=False, log=lambda text: None)


def choose_run_dir(recipe: str, config: PretrainConfig, out: Path | None, resume: str) -> tuple[Path, str]:
    """(run folder, resume mode): the mode is auto, never or a checkpoint."""
    if resume not in ("auto", "never"):
        place = Path(resume)
        if not place.is_dir():
            raise UsageError(
                f"--resume {resume}: no such folder; give auto, never, a run folder or a checkpoint in one"
            )
        if place.parent.name == "checkpoints":
            return out or place.resolve().parent.parent, str(place)
        if out is not None and out.resolve() != place.resolve():
            raise UsageError(f"--resume {resume} continues in that folder, and --out names {out}; give one of them")
        return place, "auto"
    if out is not None:
        return out, resume
    if (Path(recipe) / "config.yaml").is_file():
        return Path(recipe), resume
    return unused_dir(Path("runs"), f"{Path(recipe).stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"), resume


def unused_dir(folder: Path, name: str) -> Path:
    """A folder of that name, numbered if it exists. UsageError under torchrun, whose processes need one folder."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes need one run folder: name it with --out")
    tried, number = folder / name, 2
    while tried.exists():
        tried, number = folder / f"{name}-{number}", number + 1
    return tried


def write_plan_and_report(folder: Path, training_plan: TrainingPlan | None, log: LogFn) -> None:
    """Write the plan of a run, if there is one, and its report."""
    from llm_quest.report.page import write_report

    if training_plan is not None:
        atomic_write_json(folder / "plan.json", training_plan.as_json())
    log(f"report: {write_report([folder])}")


def plan_recipe(
    recipe: str, overrides: Sequence[str], *, measure: bool, log: LogFn
) -> TrainingPlan | ImagePlan | TuningPlan | PolicyPlan:
    """What a recipe would cost on this machine."""
    _, config, settings = load_recipe(recipe, overrides)
    if isinstance(config, VitConfig | VlmConfig):
        return plan_images(config, measure=measure, log=log)
    if isinstance(config, SftConfig | RewardConfig | DpoConfig | ClassifyConfig):
        return plan_tuning(config, measure=measure, log=log)
    if isinstance(config, GrpoConfig):
        return plan_policy(config, settings, measure=measure, log=log)
    if not isinstance(config, PretrainConfig):
        raise UsageError(f"runs of {config.recipe} are not planned; try {recipe} with max_steps=20")
    return plan_training(make_workload(config, resolve_model_config(config, settings)), measure=measure, log=log)


def make_workload(config: PretrainConfig, numbers: Any) -> TrainingWorkload:
    """The recipe as planning sees it."""
    device = resolve_device(config.device)
    techniques, checkpointing = split_checkpointing(config.techniques, config.gradient_checkpointing)
    return TrainingWorkload(
        numbers,
        rows=config.batch_size,
        length=config.sequence_length,
        steps=config.max_steps,
        micro_rows=micro_batch_size(config),
        optimizer=config.optim,
        precision=resolve_precision(config.precision, device).value,
        checkpointing=checkpointing,
        save_total_limit=config.save_total_limit,
        device=str(device),
        techniques=techniques,
        teacher=make_teacher_term(config, numbers.vocab_size, device),
    )


def make_teacher_term(config: PretrainConfig, vocab: int, device: torch.device) -> DistillationLoss | None:
    """The term that a teacher brings, where there is one."""
    if config.teacher is None:
        return None
    return build_distillation(config.teacher, config, ids=resolve_vocab_size(config), vocab=vocab, device=device)


def micro_batch_size(config: PretrainConfig) -> int:
    """As the recipe chooses them on one process."""
    from llm_quest.recipes.run import micro_batch_rows
    from llm_quest.train.parallel import DistributedContext

    return micro_batch_rows(config.batch_size, config.micro_batch_size, DistributedContext(), config.sequence_length)
