"""`quest train` and `quest plan`: from a recipe's name to a run folder with a report, or to what that would cost."""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llm_quest.cli.doctor import inspect_machine
from llm_quest.cost.plan import TrainingPlan, TrainingWorkload, plan_training
from llm_quest.cost.plan_images import ImagePlan, plan_images
from llm_quest.cost.plan_policy import PolicyPlan, plan_policy
from llm_quest.cost.plan_tuning import TuningPlan, plan_tuning
from llm_quest.data.tokens import open_token_folder
from llm_quest.errors import DataError, MissingError, UsageError
from llm_quest.files import atomic_write_json
from llm_quest.models.build import build_meta_model
from llm_quest.objectives.distillation import DistillationLoss
from llm_quest.recipes.auto import resolve_precision
from llm_quest.recipes.classify import train_classify
from llm_quest.recipes.config import (
    config_error,
    config_to_yaml,
    did_you_mean,
    load_raw_config,
    nested_schema,
    parse_config,
)
from llm_quest.recipes.config_schema import ModelConfig
from llm_quest.recipes.distillation import build_distillation
from llm_quest.recipes.dpo import train_dpo
from llm_quest.recipes.grpo import train_grpo
from llm_quest.recipes.grpo_config import GrpoConfig
from llm_quest.recipes.iterative import train_iterative
from llm_quest.recipes.iterative_config import IterativeConfig
from llm_quest.recipes.model_config import build_model_config, size_mistakes
from llm_quest.recipes.pretrain import train_pretrain
from llm_quest.recipes.pretrain_config import PretrainConfig
from llm_quest.recipes.reward import train_reward
from llm_quest.recipes.rpt.config import RptConfig, RptControlConfig
from llm_quest.recipes.rpt.control import train_rpt_control
from llm_quest.recipes.rpt.recipe import train_rpt
from llm_quest.recipes.run import RunOutcome, require_context
from llm_quest.recipes.sft import train_sft
from llm_quest.recipes.sft_warmup import WARMUP_CONTEXT
from llm_quest.recipes.techniques import split_checkpointing
from llm_quest.recipes.text_data import load_any_tokenizer
from llm_quest.recipes.tuning_config import ClassifyConfig, DpoConfig, RewardConfig, SftConfig
from llm_quest.recipes.vision_config import VitConfig, VlmConfig
from llm_quest.recipes.vit import train_vit
from llm_quest.recipes.vlm import train_vlm
from llm_quest.recipes.yaml_io import ConfigProblem, RawConfig
from llm_quest.train.parallel import resolve_device

LogFn = Callable[[str], None]

MIN_STEPS_TO_MEASURE = 100
"""From so many steps on, three are run and timed before the run begins, so that its plan is not a guess."""

RECIPE_TABLE: dict[str, tuple[Any, Any]] = {
    "pretrain": (PretrainConfig, train_pretrain),
    "vit": (VitConfig, train_vit),
    "vlm": (VlmConfig, train_vlm),
    "sft": (SftConfig, train_sft),
    "reward": (RewardConfig, train_reward),
    "dpo": (DpoConfig, train_dpo),
    "grpo": (GrpoConfig, train_grpo),
    "classify": (ClassifyConfig, train_classify),
    "iterative": (IterativeConfig, train_iterative),
    "rpt": (RptConfig, train_rpt),
    "rpt_control": (RptControlConfig, train_rpt_control),
}
"""What `recipe:` may say: the schema of its settings, and what runs them."""


@dataclass(frozen=True)
class DryRunResult:
    """A config that would run."""

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
    """Train by a recipe: a new run, or the one that lies in the folder goes on."""
    settings, config, run = load_recipe(recipe, overrides)
    if dry_run:
        if isinstance(config, PretrainConfig):
            require_fit(config, resolve_model_config(config, settings))
        return DryRunResult(config)
    folder, resume = choose_run_dir(recipe, config, out, resume)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    foreseen = None
    if isinstance(config, PretrainConfig) and alone and not (folder / "plan.json").exists():
        foreseen = plan_training(
            make_workload(config, resolve_model_config(config, settings)),
            measure=config.max_steps >= MIN_STEPS_TO_MEASURE,
            log=log,
        )
    with removed_if_refused(folder):
        outcome = run(
            config, settings, folder, resume=resume, env=inspect_machine(folder).as_json(), quiet=quiet, log=log
        )
    if os.environ.get("RANK", "0") == "0":
        write_plan_and_report(folder, foreseen, log)
    return outcome


REFUSALS = (UsageError, DataError, MissingError)


@contextmanager
def removed_if_refused(folder: Path) -> Iterator[None]:
    """A run that is refused leaves no new folder behind, unless something was learned in it by then (a warm-up)."""
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


def load_recipe(recipe: str, overrides: Sequence[str]) -> tuple[RawConfig, PretrainConfig, Callable[..., RunOutcome]]:
    """The settings, the typed config, and what runs it."""
    settings = load_raw_config(recipe, overrides)
    kind = settings.tree.get("recipe")
    if not settings.problems and kind not in RECIPE_TABLE:
        what = (
            "missing" if kind is None else f"{kind!r} is no kind of recipe{did_you_mean(str(kind), list(RECIPE_TABLE))}"
        )
        raise config_error(
            [ConfigProblem(settings.location(("recipe",)), "recipe", f"{what}; known: {', '.join(RECIPE_TABLE)}")]
        )
    schema, run = RECIPE_TABLE.get(str(kind), RECIPE_TABLE["pretrain"])
    return settings, parse_config(schema, settings, size_mistakes_of(schema, settings)), run


def size_mistakes_of(schema: Any, settings: RawConfig) -> list[ConfigProblem]:
    """Of a model that is to be built. Its tokenizer is not there yet, so a vocabulary of no consequence stands in."""
    field = schema.model_fields.get("model")
    if field is None or nested_schema(field.annotation) is not ModelConfig or settings.problems:
        return []
    rows = schema.model_fields.get("sequence_length")
    context = settings.tree.get("sequence_length", rows.default) if rows is not None else WARMUP_CONTEXT
    return size_mistakes(settings, vocab=512, context=context if type(context) is int else WARMUP_CONTEXT)


def choose_run_dir(recipe: str, config: PretrainConfig, out: Path | None, resume: str) -> tuple[Path, str]:
    """The run folder, and auto, never or a checkpoint to begin from."""
    if resume not in ("auto", "never"):
        place = Path(resume)
        if not place.is_dir():
            raise UsageError(
                f"--resume {resume}: no such folder; give auto, never, a run folder or a checkpoint in one"
            )
        if place.parent.name == "checkpoints":
            return out or place.resolve().parent.parent, str(place)
        if out is not None and out.resolve() != place.resolve():
            raise UsageError(f"--resume {resume} goes on in that folder, and --out names {out}; give one of them")
        return place, "auto"
    if out is not None:
        return out, resume
    if (Path(recipe) / "config.yaml").is_file():
        return Path(recipe), resume
    return unused_dir(Path("runs"), f"{Path(recipe).stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"), resume


def unused_dir(folder: Path, name: str) -> Path:
    """A folder of that name that is not there yet. Processes of one torchrun agree on it by its run id."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes need one run folder: name it with --out")
    tried, number = folder / name, 2
    while tried.exists():
        tried, number = folder / f"{name}-{number}", number + 1
    return tried


def write_plan_and_report(folder: Path, training_plan: TrainingPlan | None, log: LogFn) -> None:
    """The plan made before the run, beside what was measured, and the report."""
    from llm_quest.report.page import write_report

    if training_plan is not None:
        atomic_write_json(folder / "plan.json", training_plan.as_json())
    log(f"report: {write_report([folder])}")


def plan_recipe(
    recipe: str, overrides: Sequence[str], *, measure: bool, log: LogFn
) -> TrainingPlan | ImagePlan | TuningPlan | PolicyPlan:
    """What a recipe would cost on this machine."""
    settings, config, _ = load_recipe(recipe, overrides)
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


def resolve_model_config(config: PretrainConfig, settings: RawConfig) -> Any:
    """The model's config without preparing the data: a tokenizer to be trained counts with the size it is asked for."""
    if config.model.load is not None:
        from llm_quest.hub.load_save import load

        return load(config.model.load, dtype="float32").config
    return build_model_config(config.model, settings, vocab=resolve_vocab_size(config), context=config.sequence_length)


def require_fit(config: PretrainConfig, numbers: Any) -> None:
    """What the run would refuse once the model is there: rows longer than its context, settings of parts that it does
    not have."""
    require_context(config.sequence_length, numbers.max_position_embeddings)
    added = any(one["name"] == "multi_token" for one in config.techniques)
    parts = replace(config.auxiliary_losses, mtp_loss_weight=None) if added else config.auxiliary_losses
    parts.resolve(build_meta_model(numbers))


def resolve_vocab_size(config: PretrainConfig) -> int:
    """How many tokens the tokenizer has, or will have."""
    if (Path(config.data.source) / "manifest.json").is_file():
        return int(open_token_folder(config.data.source, verify="size").manifest["vocab_size"])
    part = config.tokenizer
    return part.vocab_size if part.load is None else load_any_tokenizer(part.load).vocab_size
