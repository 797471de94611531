"""`quest train dpo`: preferences -> a model that gives the better answer more probability than it had and the worse one
less, without a reward model.

Commonly got wrong: a question's pass is shared by its answers, but not under FSDP2, which shards a block again after
its first pass; the reference is the model that the run begins with, so the first loss is ln 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from llm_quest.contracts import Callback, Loader
from llm_quest.data.builtin_qa import builtin_preferences
from llm_quest.data.preference_pairs import PreferenceBatch
from llm_quest.errors import UsageError
from llm_quest.eval.evaluators import PairsEvaluator
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.preference import PreferenceLoss, relative_log_probs, sequence_log_probs
from llm_quest.objectives.preference_loss_numbers import make_preference_loss
from llm_quest.objectives.preference_losses import PREFERENCE_LOSSES, PairwiseLoss
from llm_quest.recipes.config_schema import NonNegativeInt, PositiveFloat, PositiveInt
from llm_quest.recipes.diagnostics import SUPERVISED_SYMPTOMS, WINDOW
from llm_quest.recipes.finetuning import (
    PairBatchedConfig,
    PreferenceDataConfig,
    StartModelConfig,
    apply_config_techniques,
    begin_finetuning,
    can_share_prompts,
    count_steps,
    data_facts,
    pairs_loader,
    pairs_read,
    prepare_preferences,
    set_generation_eos,
)
from llm_quest.recipes.recipe import Context, Job, Recipe, save_nothing
from llm_quest.recipes.reference_model import (
    ReferenceContext,
    SyncedReference,
    has_adapter,
    make_initial_reference,
    reference_log_probs,
)
from llm_quest.recipes.schema import Choice
from llm_quest.rollouts.diagnostics import Diagnostics, MetricsRow, Symptom, metric_value
from llm_quest.techniques.adapter_merge import require_adapters
from llm_quest.train.rng_state import derive_seed


class DpoConfig(PairBatchedConfig):
    """A model that answers and preferences in, a model that prefers out."""

    recipe: Literal["dpo"]
    model: StartModelConfig
    data: PreferenceDataConfig = PreferenceDataConfig()
    loss_type: Annotated[str, Choice(PREFERENCE_LOSSES)] = Field(default="dpo", description="which preference loss")
    beta: PositiveFloat | None = Field(
        default=None, description="how strongly the policy is held to the reference; null: as the loss has it, dpo 0.1"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="the fraction of wrong labels (cdpo, robust, exo_pair, aot)"
    )
    loss_kwargs: dict[str, float] = Field(
        default_factory=dict, description="further numbers of the loss: simpo_gamma; discopop_tau"
    )
    rpo_alpha: float | None = Field(
        default=None,
        ge=0,
        description="weight of the SFT term, NLL of the chosen answer (RPO); null: as the loss has it",
    )
    average_log_prob: bool = Field(
        default=False, description="means over tokens in place of sums, as TRL has it for ipo"
    )
    precompute_ref_log_probs: bool = Field(
        default=True, description="before the first step; false: at every step, with the adapters of this run off"
    )
    sync_ref_model: bool = Field(default=False, description="TR-DPO: the reference follows the policy")
    ref_model_sync_steps: PositiveInt = Field(default=512, description="TR-DPO: steps between two updates")
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.6, description="TR-DPO: the policy's weight in an update of the reference"
    )
    eval_steps: NonNegativeInt = Field(default=50, description="steps between evaluations; 0: only at the end")

    @model_validator(mode="after")
    def check_loss(self) -> DpoConfig:
        loss = self.build_loss()
        if loss.traits.needs_reference:
            return self
        for key in ("precompute_ref_log_probs", "sync_ref_model"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} has no effect on loss_type={self.loss_type}, which has no reference; leave it out"
                )
        return self

    def build_loss(self) -> PairwiseLoss:
        """The loss of this name with its numbers."""
        smoothing = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        beta = {} if self.beta is None else {"beta": self.beta}
        return make_preference_loss(self.loss_type, **beta, **smoothing, **self.loss_kwargs)

    @model_validator(mode="after")
    def check_single_reference(self) -> DpoConfig:
        if not self.sync_ref_model:
            return self
        if self.parallel == "fsdp":
            raise ValueError(
                "sync_ref_model keeps a whole copy of the model on each process: set parallel=ddp, or leave it out"
            )
        if not self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model makes a reference model of its own, so precompute_ref_log_probs=false has no effect; "
                "leave one out"
            )
        return self


def build_dpo(config: DpoConfig, context: Context) -> Job:
    """Model, pairs, reference, preference loss."""
    parallel, log, out = context.parallel, context.log, context.run_dir
    config, model, tokenizer = begin_finetuning(config, context, builtin_preferences)
    pairs = prepare_preferences(config.data, tokenizer, config.sequence_length, derive_seed(config.seed, "flips"))
    set_generation_eos(model, tokenizer, (answer[-1] for one in pairs.train for answer in one.answers))
    adapted_before = has_adapter(model)
    callbacks: list[Callback] = apply_config_techniques(config, model, log)
    loss = config.build_loss()
    objective = PreferenceLoss(model, loss, average_log_prob=config.average_log_prob, sft_weight=config.rpo_alpha)
    config = count_steps(config, context, model, len(pairs.train))
    row_loader = pairs_loader(config, pairs, parallel)
    if loss.traits.sorts_batch:
        require_whole_step(config, row_loader.micro_batch_size)
    share = can_share_prompts(config) and parallel.strategy != "fsdp"  # which shards a block again after its first pass
    row_loader.source.share_prompts = share
    loader: Loader = row_loader
    if config.sync_ref_model:
        synced_reference = build_synced_reference(config, row_loader, model, context)
        objective.reference, loader, callbacks = synced_reference, synced_reference, [*callbacks, synced_reference]
    elif not config.precompute_ref_log_probs:
        require_adapters(model)
        initial = make_initial_reference(model.to(parallel.device), adapted_before=adapted_before)
        objective.reference = lambda batch: initial_log_probs(initial, batch)

    def compute_reference() -> Callable[[Path], None]:
        """The reference's log-probabilities: of the held-out pairs always, so that what is measured on them stays
        comparable; of the training pairs that are read where nothing else computes them."""
        if not loss.traits.needs_reference:
            return save_nothing
        rows = [] if objective.reference is not None else list(pairs.train)
        every = [*rows, *pairs.held_out]
        needed = [*(pairs_read(config, row_loader) if rows else ()), *range(len(rows), len(every))]
        log_probs = reference_log_probs(
            model, every, out, parallel, config.precision, log, needed=needed, share_prompts=share
        )
        row_loader.source.reference_log_probs = log_probs.log_probs[: len(rows)] or None
        evaluator.pairs.reference_log_probs = log_probs.log_probs[len(rows) :]
        return log_probs.save

    def implicit_rewards(model: Any, batch: PreferenceBatch) -> Tensor:
        """beta (log p - log p_ref) of each answer, as the loss has it."""
        reference = batch.reference_log_probs if loss.traits.needs_reference else None
        log_probs = sequence_log_probs(model, batch)
        return loss.beta * relative_log_probs(log_probs, reference, batch.targets, average=objective.average_log_prob)

    evaluator = PairsEvaluator(pairs.held_out, config.eval_steps, implicit_rewards)
    data_info = data_facts(config.data, pairs.chat, pairs.drop_report, len(pairs.train), len(pairs.held_out), log)
    return Job(
        config,
        objective,
        loader,
        [evaluator] if pairs.held_out else [],
        {"tokenizer": tokenizer.hash, "data": row_loader.source.hash, "held_out": evaluator.pairs.hash},
        data_info,
        tokenizer,
        callbacks=callbacks,
        watchers=[Diagnostics(symptoms=(*SUPERVISED_SYMPTOMS, *PROBABILITY_SYMPTOMS))],
        prepare=compute_reference,
    )


def require_whole_step(config: DpoConfig, micro_batch_size: int) -> None:
    """UsageError where the pairs of a step are not in one micro-batch of one process."""
    if micro_batch_size < config.batch_size:
        raise UsageError(
            f"loss_type={config.loss_type} compares all pairs of a step with each other, and a micro-batch has "
            f"{micro_batch_size} of {config.batch_size}: set micro_batch_size={config.batch_size} on one process, or "
            "lower batch_size"
        )


def build_synced_reference(config: DpoConfig, loader: Any, model: Decoder, context: Context) -> SyncedReference:
    """A reference that follows the policy."""
    return SyncedReference(
        loader,
        model.to(context.parallel.device),
        context.run_dir,
        sync_steps=config.ref_model_sync_steps,
        mixup_alpha=config.ref_model_mixup_alpha,
        save_total_limit=config.save_total_limit,
        is_main_process=context.parallel.is_main_process,
    )


def initial_log_probs(initial: ReferenceContext, batch: PreferenceBatch) -> Tensor:
    """The log-probability of each row by the initial model."""
    with initial() as reference:
        return sequence_log_probs(reference, batch)


def both_answers_fall(rows: Sequence[MetricsRow]) -> bool:
    """Both answers have lost a fifth of their log-probability, and the margin is half its best or less."""
    if len(rows) < 2 * WINDOW:
        return False
    first, last = rows[:WINDOW], rows[-WINDOW:]
    before, after = ([mean_metric(some, f"logps/{side}") for side in ("chosen", "rejected")] for some in (first, last))
    best = max(mean_metric(rows[i : i + WINDOW], "rewards/margin") for i in range(len(rows) - WINDOW + 1))
    fell = all(b < 0 and a < 1.2 * b for b, a in zip(before, after, strict=True))
    return fell and best > 0 and mean_metric(last, "rewards/margin") < best / 2


def chosen_falls(rows: Sequence[MetricsRow]) -> bool:
    """The log-probability of the chosen answers has fallen to 1.5 times its first (negative) value."""
    if len(rows) < 2 * WINDOW:
        return False
    before, after = (mean_metric(some, "logps/chosen") for some in (rows[:WINDOW], rows[-WINDOW:]))
    return before < 0 and after < 1.5 * before


def mean_metric(rows: Sequence[MetricsRow], name: str) -> float:
    return sum(metric_value(row, name) for row in rows) / len(rows)


PROBABILITY_SYMPTOMS = (
    Symptom(
        "margin collapses",
        both_answers_fall,
        lambda row: (
            "both answers become less probable and the margin collapses (now "
            f"{metric_value(row, 'rewards/margin'):.3f}): lower learning_rate, raise beta, or add an SFT term "
            "(rpo_alpha=1)"
        ),
    ),
    Symptom(
        "chosen answers fall",
        chosen_falls,
        lambda row: (
            f"the better answers become less probable too ({metric_value(row, 'logps/chosen'):.1f} nats now): the "
            "margin grows because the worse ones fall faster; add an SFT term (rpo_alpha=1), raise beta, or lower "
            "learning_rate"
        ),
    ),
)


RECIPE = Recipe("dpo", DpoConfig, build_dpo)
