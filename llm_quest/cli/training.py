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

from llm_quest.cli.machine import doctor
from llm_quest.cli.planning import Plan, Work, plan
from llm_quest.cli.planning_images import ImagePlan, plan_images
from llm_quest.cli.planning_policy import PolicyPlan, plan_policy
from llm_quest.cli.planning_tuning import TuningPlan, plan_tuning
from llm_quest.data.tokens import open_tokens
from llm_quest.disk import replace_json
from llm_quest.errors import DataError, MissingError, UsageError
from llm_quest.models.build import skeleton
from llm_quest.objectives.distillation import Distillation
from llm_quest.recipes.choices import precision
from llm_quest.recipes.classify import train_classify
from llm_quest.recipes.config import as_yaml, gather, mistaken, nearest, part_of, resolve
from llm_quest.recipes.course import Outcome, require_context
from llm_quest.recipes.dpo import train_dpo
from llm_quest.recipes.grpo import train_grpo
from llm_quest.recipes.grpo_config import Grpo
from llm_quest.recipes.iterative import train_iterative
from llm_quest.recipes.iterative_config import Iterative
from llm_quest.recipes.parts import Batch, Model
from llm_quest.recipes.pretrain import pretrain
from llm_quest.recipes.pretrain_config import Pretrain
from llm_quest.recipes.reward import train_reward
from llm_quest.recipes.rpt import train_rpt
from llm_quest.recipes.rpt_config import Rpt, RptControl
from llm_quest.recipes.rpt_control import train_rpt_control
from llm_quest.recipes.sft import train_sft
from llm_quest.recipes.sizes import model_config, size_mistakes
from llm_quest.recipes.teaching import lesson
from llm_quest.recipes.techniques import without_checkpointing
from llm_quest.recipes.text import loaded
from llm_quest.recipes.tuning_config import Classify, Dpo, Reward, Sft
from llm_quest.recipes.vision_config import Vit, Vlm
from llm_quest.recipes.vit import train_vit
from llm_quest.recipes.vlm import train_vlm
from llm_quest.recipes.warmup import CONTEXT
from llm_quest.recipes.yaml import Mistake, Settings
from llm_quest.train.parallel import pick_device

Say = Callable[[str], None]

WORTH_MEASURING = 100
"""From so many steps on, three are run and timed before the run begins, so that its plan is not a guess."""

RECIPES: dict[str, tuple[Any, Any]] = {
    "pretrain": (Pretrain, pretrain),
    "vit": (Vit, train_vit),
    "vlm": (Vlm, train_vlm),
    "sft": (Sft, train_sft),
    "reward": (Reward, train_reward),
    "dpo": (Dpo, train_dpo),
    "grpo": (Grpo, train_grpo),
    "classify": (Classify, train_classify),
    "iterative": (Iterative, train_iterative),
    "rpt": (Rpt, train_rpt),
    "rpt_control": (RptControl, train_rpt_control),
}
"""What `recipe:` may say: the schema of its settings, and what runs them."""


@dataclass(frozen=True)
class Checked:
    """A config that would run."""

    config: Pretrain
    exit_code: int = 0

    def as_json(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")

    def lines(self) -> list[str]:
        return as_yaml(self.config).splitlines()


def start(
    recipe: str,
    pairs: Sequence[str],
    *,
    out: Path | None,
    resume: str = "auto",
    dry_run: bool = False,
    quiet: bool = False,
    say: Say,
) -> Outcome | Checked:
    """Train by a recipe: a new run, or the one that lies in the folder goes on."""
    settings, config, run = understood(recipe, pairs)
    if dry_run:
        if isinstance(config, Pretrain):
            require_fit(config, sizes(config, settings))
        return Checked(config)
    folder, resume = where(recipe, config, out, resume)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    foreseen = None
    if isinstance(config, Pretrain) and alone and not (folder / "plan.json").exists():
        foreseen = plan(work(config, sizes(config, settings)), measure=config.steps >= WORTH_MEASURING, say=say)
    with removed_if_refused(folder):
        outcome = run(config, settings, folder, resume=resume, env=doctor(folder).as_json(), quiet=quiet, say=say)
    if os.environ.get("RANK", "0") == "0":
        conclude(folder, foreseen, say)
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


def understood(recipe: str, pairs: Sequence[str]) -> tuple[Settings, Pretrain, Callable[..., Outcome]]:
    """The settings, the typed config, and what runs it."""
    settings = gather(recipe, pairs)
    kind = settings.tree.get("recipe")
    if not settings.mistakes and kind not in RECIPES:
        what = "missing" if kind is None else f"{kind!r} is no kind of recipe{nearest(str(kind), list(RECIPES))}"
        raise mistaken([Mistake(settings.place(("recipe",)), "recipe", f"{what}; known: {', '.join(RECIPES)}")])
    schema, run = RECIPES.get(str(kind), RECIPES["pretrain"])
    return settings, resolve(schema, settings, size_mistakes_of(schema, settings)), run


def size_mistakes_of(schema: Any, settings: Settings) -> list[Mistake]:
    """Of a model that is to be built. Its tokenizer is not there yet, so a vocabulary of no consequence stands in."""
    field = schema.model_fields.get("model")
    if field is None or part_of(field.annotation) is not Model or settings.mistakes:
        return []
    batch = settings.tree.get("batch", {}) if "batch" in schema.model_fields else {}
    length = batch.get("length", Batch().length) if isinstance(batch, dict) else CONTEXT
    context = length if "batch" in schema.model_fields else CONTEXT
    return size_mistakes(settings, vocab=512, context=context if type(context) is int else CONTEXT)


def where(recipe: str, config: Pretrain, out: Path | None, resume: str) -> tuple[Path, str]:
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
    return fresh(Path("runs"), f"{Path(recipe).stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"), resume


def fresh(folder: Path, name: str) -> Path:
    """A folder of that name that is not there yet. Processes of one torchrun agree on it by its run id."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes need one run folder: name it with --out")
    tried, number = folder / name, 2
    while tried.exists():
        tried, number = folder / f"{name}-{number}", number + 1
    return tried


def conclude(folder: Path, foreseen: Plan | None, say: Say) -> None:
    """The plan made before the run, beside what was measured, and the report."""
    from llm_quest.report.page import report

    if foreseen is not None:
        replace_json(folder / "plan.json", foreseen.as_json())
    say(f"report: {report([folder])}")


def foresee(
    recipe: str, pairs: Sequence[str], *, measure: bool, say: Say
) -> Plan | ImagePlan | TuningPlan | PolicyPlan:
    """What a recipe would cost on this machine."""
    settings, config, _ = understood(recipe, pairs)
    if isinstance(config, Vit | Vlm):
        return plan_images(config, measure=measure, say=say)
    if isinstance(config, Sft | Reward | Dpo | Classify):
        return plan_tuning(config, measure=measure, say=say)
    if isinstance(config, Grpo):
        return plan_policy(config, settings, measure=measure, say=say)
    if not isinstance(config, Pretrain):
        raise UsageError(f"runs of {config.recipe} are not planned; try {recipe} with steps=20")
    return plan(work(config, sizes(config, settings)), measure=measure, say=say)


def work(config: Pretrain, numbers: Any) -> Work:
    """The recipe as planning sees it."""
    device = pick_device(config.device)
    techniques, checkpointing = without_checkpointing(config.techniques, config.activation_checkpointing)
    return Work(
        numbers,
        rows=config.batch.rows,
        length=config.batch.length,
        steps=config.steps,
        micro_rows=micro_rows(config),
        optimizer=config.optimizer.name,
        precision=precision(config.precision, device).value,
        checkpointing=checkpointing,
        keep=config.checkpoint.keep,
        device=str(device),
        techniques=techniques,
        teacher=teacher(config, numbers.vocab, device),
    )


def teacher(config: Pretrain, vocab: int, device: torch.device) -> Distillation | None:
    """The term that a teacher brings, where there is one."""
    if config.teacher is None:
        return None
    return lesson(config.teacher, config, ids=vocabulary(config), vocab=vocab, device=device)


def micro_rows(config: Pretrain) -> int:
    """As the recipe chooses them on one process."""
    from llm_quest.recipes.course import micro_rows_of
    from llm_quest.train.parallel import Parallel

    return micro_rows_of(config.batch, Parallel(), config.batch.length)


def sizes(config: Pretrain, settings: Settings) -> Any:
    """The model's config without preparing the data: a tokenizer to be trained counts with the size it is asked for."""
    if config.model.load is not None:
        from llm_quest.hub.files import load

        return load(config.model.load, dtype="float32").config
    return model_config(config.model, settings, vocab=vocabulary(config), context=config.batch.length)


def require_fit(config: Pretrain, numbers: Any) -> None:
    """What the run would refuse once the model is there: rows longer than its context, settings of parts that it does
    not have."""
    require_context(config.batch.length, numbers.context)
    added = any(one["name"] == "multi_token" for one in config.techniques)
    parts = replace(config.parts, lookahead=None) if added else config.parts
    parts.decided(skeleton(numbers))


def vocabulary(config: Pretrain) -> int:
    """How many tokens the tokenizer has, or will have."""
    if (Path(config.data.source) / "manifest.json").is_file():
        return int(open_tokens(config.data.source, verify="size").manifest["vocab_size"])
    part = config.tokenizer
    return part.vocab if part.load is None else loaded(part.load).vocab_size
