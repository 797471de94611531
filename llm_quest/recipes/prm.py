"""`quest train prm`: solutions whose steps are labeled -> a process reward model, which scores the end of every
step.

Commonly got wrong: a step's label is at the separator that ends it, not before; separators in the question end no step;
steps without a label have no loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field

from llm_quest.data.document import DropReport
from llm_quest.data.loader import length_grouped_indices, repeat_by_weight
from llm_quest.data.row_forms import STEP_FORMS
from llm_quest.data.step_labels import StepDataset, TokenizedSteps, read_labeled_steps, tokenize_steps
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.objectives.process_reward import ProcessRewardLoss
from llm_quest.recipes.assembly import (
    load_split_rows,
    log_remarks,
    make_sharded_loader,
    micro_batch_rows,
    source_name,
)
from llm_quest.recipes.config_schema import NonNegativeInt, PositiveInt
from llm_quest.recipes.diagnostics import SUPERVISED_SYMPTOMS
from llm_quest.recipes.finetuning import (
    PairBatchedConfig,
    StartModelConfig,
    apply_config_techniques,
    begin_finetuning,
    count_steps,
)
from llm_quest.recipes.recipe import Context, Job, Recipe
from llm_quest.recipes.row_source import RowsConfig
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.techniques.score_head import ScoreHead, find_score_head
from llm_quest.train.rng_state import derive_seed

EVAL_BATCH_SIZE = 16


class StepDataConfig(RowsConfig):
    """Solutions with labeled steps."""

    forms = STEP_FORMS
    held_out: float = Field(
        default=0.1, ge=0, lt=0.5, description="the part of the questions that is never trained on; 0: none"
    )
    max_samples: PositiveInt | None = Field(default=None, description="use so many rows; null: all")
    step_separator: str = Field(default="\n", min_length=1, description="what ends every step")


class PrmConfig(PairBatchedConfig):
    """A model and solutions with labeled steps in, a model that scores steps out."""

    recipe: Literal["prm"]
    model: StartModelConfig
    data: StepDataConfig
    eval_steps: NonNegativeInt = Field(default=50, description="steps between evaluations; 0: only at the end")


def build_prm(config: PrmConfig, context: Context) -> Job:
    """Model, labeled steps, the loss at the end of each."""
    parallel, log = context.parallel, context.log
    config, model, tokenizer = begin_finetuning(config, context, no_builtin_rows)
    train, held_out, drop_report = prepare_steps(config, tokenizer)
    config = count_steps(config, context, model, len(train))
    callbacks = apply_config_techniques(config, model, log, scores=True)
    add_step_head(model, tokenizer, config)
    source = StepDataset(train)
    rows = micro_batch_rows(config, parallel, max(one.length for one in train))
    right = sum(label > 0.5 for one in train for label in one.labels)
    steps = sum(len(one.labels) for one in train)
    log(f"rows: {len(train):,} to train on, {len(held_out):,} held out; {right:,} of {steps:,} steps are right")
    log_remarks(drop_report, log)
    facts = {
        "source": source_name(config.data), "train_rows": len(train), "held_out_rows": len(held_out),
        **drop_report.row_facts(), "steps": steps, "right_steps": right,
    }  # fmt: skip
    return Job(
        config, ProcessRewardLoss(model), make_sharded_loader(config, source, parallel, rows),
        [StepEvaluator(held_out, config.eval_steps)] if held_out else [],
        {"tokenizer": tokenizer.hash, "data": source.hash, "held_out": StepDataset(held_out).hash}, facts, tokenizer,
        callbacks=callbacks, watchers=[Diagnostics(symptoms=SUPERVISED_SYMPTOMS)],
    )  # fmt: skip


def no_builtin_rows() -> Any:
    raise UsageError("labeled steps are not built in: give data.source=FILE with prompt, completions and labels")


def plain_prompt_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids before a prompt of plain text."""
    return [tokenizer.start_token_id]


def prepare_steps(
    config: PrmConfig, tokenizer: Tokenizer
) -> tuple[list[TokenizedSteps], list[TokenizedSteps], DropReport]:
    """Prepare the rows of ids of a source, and held-out ones."""
    drop_report = DropReport()
    data = config.data
    learned, held_back = load_split_rows(
        data, read_labeled_steps, drop_report, builtin=no_builtin_rows, limit=data.max_samples
    )
    encode = partial(tokenizer.encode, add_special_tokens=False)
    train, held_out = (
        tokenize_steps(
            part, plain_prompt_ids(tokenizer), encode, data.step_separator, config.sequence_length, drop_report
        )
        for part in (repeat_by_weight(learned), held_back)
    )
    return train, held_out, drop_report


def add_step_head(model: Any, tokenizer: Tokenizer, config: PrmConfig) -> None:
    """Add a score head that reads the ends of steps. UsageError for a model whose score head reads others."""
    separator = tuple(tokenizer.encode(config.data.step_separator, add_special_tokens=False))
    head = find_score_head(model)
    if head is None:
        seed = derive_seed(config.seed, "init")
        ScoreHead(1, seed=seed, readout="mean_steps", step_token_ids=separator)(model)
    elif head.step_token_ids != separator:
        raise UsageError(
            f"model.load={config.model.load} has a score head that reads other steps, or none: go on from a language "
            "model, or from a process reward model with the same data.step_separator"
        )


class StepEvaluator:
    """Evaluates held-out steps: loss, accuracy, the mean score of right and of wrong ones."""

    name = "eval"

    def __init__(self, rows: Sequence[TokenizedSteps], every: int):
        self.rows, self.interval = StepDataset(rows), every

    @torch.no_grad()
    def evaluate(self, model: Any, step: int) -> Mapping[str, float]:
        objective, device = ProcessRewardLoss(model), next(model.parameters()).device
        batches = [self.rows.collate(numbers) for numbers in length_grouped_indices(self.rows, EVAL_BATCH_SIZE)]
        losses = [objective(batch.to(device)) for batch in batches]
        pairs = [{"loss": (loss.total, loss.count), **loss.metrics} for loss in losses]
        sums = {name: [sum(float(pair[name][part]) for pair in pairs) for part in (0, 1)] for name in pairs[0]}
        return {name: total / count for name, (total, count) in sums.items() if count}


RECIPE = Recipe("prm", PrmConfig, build_prm)
