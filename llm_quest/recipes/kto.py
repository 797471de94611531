"""`quest train kto`: single answers labeled as desirable or not -> a model that gives desirable ones more probability
than it had, without pairs and without a reward model.

Commonly got wrong: the reference point is the mean over all processes' rows, not over one process's own; held-out rows
have one of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from llm_quest.contracts import LogFn
from llm_quest.data.builtin_qa import builtin_preferences
from llm_quest.data.document import DropReport
from llm_quest.data.loader import ShardedLoader, length_grouped_indices, repeat_by_weight
from llm_quest.data.preference_pairs import PreferenceBatch, PreferenceDataset
from llm_quest.data.preferences import TokenizedPreference, tokenize_preferences
from llm_quest.data.row_forms import PREFERENCE_FORMS, RATED_FORMS
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.unpaired import UnpairedBatch, add_mismatched_answers, own_rows, read_unpaired, repeat_answers
from llm_quest.objectives.kto import (
    UNPAIRED_LOSSES,
    KTOLoss,
    UnpairedLoss,
    balance_note,
    gains_with_mismatch,
    reference_point,
)
from llm_quest.objectives.preference import sequence_log_probs
from llm_quest.recipes.assembly import load_split_rows
from llm_quest.recipes.chat_template_config import open_chat_template
from llm_quest.recipes.config_schema import NonNegativeInt, PositiveFloat
from llm_quest.recipes.diagnostics import SUPERVISED_SYMPTOMS
from llm_quest.recipes.finetuning import (
    ConversationDataConfig,
    PairBatchedConfig,
    PreferenceData,
    StartModelConfig,
    apply_config_techniques,
    begin_finetuning,
    count_steps,
    data_facts,
    pairs_loader,
    pairs_read,
    set_generation_eos,
)
from llm_quest.recipes.recipe import Context, Job, Recipe
from llm_quest.recipes.reference_model import reference_log_probs
from llm_quest.recipes.schema import Choice
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import derive_seed
from llm_quest.train.step import autocast

PolicyContext = Callable[[], AbstractContextManager[Any]]
EVAL_BATCH_SIZE = 16


class UnpairedDataConfig(ConversationDataConfig):
    """Answers that are labeled as desirable or not; a pair is one of each."""

    forms = (*RATED_FORMS, *PREFERENCE_FORMS)


class KtoConfig(PairBatchedConfig):
    """A model that answers and labeled answers in, a model that prefers the desirable ones out."""

    recipe: Literal["kto"]
    model: StartModelConfig
    data: UnpairedDataConfig = UnpairedDataConfig()
    loss_type: Annotated[str, Choice(UNPAIRED_LOSSES)] = Field(default="kto", description="loss of single answers")
    beta: PositiveFloat = Field(default=0.1, description="how strongly the policy is held to the reference")
    desirable_weight: PositiveFloat = Field(default=1.0, description="weight of the loss of desirable answers")
    undesirable_weight: PositiveFloat = Field(default=1.0, description="weight of the loss of undesirable answers")
    eval_steps: NonNegativeInt = Field(default=50, description="steps between evaluations; 0: only at the end")

    def build_loss(self) -> UnpairedLoss:
        loss: UnpairedLoss = UNPAIRED_LOSSES[self.loss_type](self.beta)
        return loss


class KTOLoader:
    """A `contracts.Loader` of labeled rows that carry the reference point z of their step: the policy reads the
    mismatched answers of all processes' rows before it learns from their own.

    policy_context: inside it the policy is whole and in the precision of the step. needs_kl: False where z is not read;
    it is 0 then."""

    def __init__(
        self,
        loader: ShardedLoader[PreferenceDataset],
        model: nn.Module,
        parallel: DistributedContext,
        *,
        policy_context: PolicyContext,
        needs_kl: bool,
    ):
        self.loader, self.model, self.parallel = loader, model, parallel
        self.policy_context, self.needs_kl = policy_context, needs_kl

    def batches(self, step: int) -> list[UnpairedBatch]:
        batches = self.loader.batches(step)
        known = all(batch.reference_log_probs is not None for batch in batches)
        z = self.estimate_kl(batches) if self.needs_kl and known else torch.zeros(())
        return [own_rows(batch, z) for batch in batches]

    def estimate_kl(self, batches: Sequence[PreferenceBatch]) -> Tensor:
        with self.policy_context():
            own_gains = gains_with_mismatch(self.model, batches)
        return reference_point(self.parallel.all_gather(own_gains))

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)


class UnpairedEvaluator:
    """Evaluates held-out rows: the loss, its metrics, margin: what the rewards of desirable and undesirable answers
    differ by, and auc: how often a desirable answer has the larger one. Held-out rows have a reference point of their
    own."""

    name = "eval"

    def __init__(self, rows: Sequence[TokenizedPreference], every: int, make_objective: Callable[[Any], KTOLoss]):
        self.rows, self.interval, self.make_objective = PreferenceDataset(rows), every, make_objective

    @torch.no_grad()
    def evaluate(self, model: Any, step: int) -> Mapping[str, float]:
        objective, device = self.make_objective(model), next(model.parameters()).device
        labeled = [self.rows.collate(numbers) for numbers in length_grouped_indices(self.rows, EVAL_BATCH_SIZE)]
        z = reference_point([gains_with_mismatch(model, labeled)]) if objective.loss.needs_kl else torch.zeros(())
        batches = [own_rows(batch, z).to(device) for batch in labeled]
        log_probs = [sequence_log_probs(model, rows) for rows in batches]
        gains = [log_p - rows.reference_log_probs for log_p, rows in zip(log_probs, batches, strict=True)]
        losses = [objective.loss_of(log_p, rows) for log_p, rows in zip(log_probs, batches, strict=True)]
        metrics = {"loss": sum(float(loss.total) for loss in losses) / len(self.rows)}
        for name in losses[0].metrics:
            sums = [(float(loss.metrics[name][0]), float(loss.metrics[name][1])) for loss in losses]
            total, count = map(sum, zip(*sums, strict=True))
            if count:
                metrics[name.removeprefix("rewards/")] = total / count
        if "chosen" in metrics and "rejected" in metrics:
            metrics["margin"] = metrics["chosen"] - metrics["rejected"]
            metrics["auc"] = area_under_curve(torch.cat(gains), torch.cat([rows.desirable for rows in batches]))
        return metrics


def area_under_curve(rewards: Tensor, desirable: Tensor) -> float:
    """The probability that a desirable answer has a larger reward than an undesirable one; a tie counts half."""
    difference = rewards[desirable][:, None] - rewards[~desirable][None, :]
    return float(((difference > 0).double() + (difference == 0).double() / 2).mean())


def build_kto(config: KtoConfig, context: Context) -> Job:
    """Model, labeled rows, reference, KTO loss."""
    parallel, log, out = context.parallel, context.log, context.run_dir
    config, model, tokenizer = begin_finetuning(config, context, builtin_preferences)
    loss = config.build_loss()
    rows = prepare_unpaired(config, tokenizer, loss, log)
    set_generation_eos(model, tokenizer, (one.answers[0][-1] for one in rows.train))
    config = count_steps(config, context, model, len(rows.train))
    callbacks = apply_config_techniques(config, model, log)
    make_objective = partial(
        KTOLoss, loss=loss, desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight
    )
    objective, row_loader = make_objective(model), pairs_loader(config, rows, parallel)
    loader = KTOLoader(
        row_loader, model, parallel, needs_kl=loss.needs_kl,
        policy_context=partial(policy_context, config, parallel, objective),
    )  # fmt: skip
    evaluator = UnpairedEvaluator(rows.held_out, config.eval_steps, make_objective)

    def compute_reference() -> Callable[[Path], None]:
        every = [*rows.train, *rows.held_out]
        needed = [*pairs_read(config, row_loader), *range(len(rows.train), len(every))]
        log_probs = reference_log_probs(model, every, out, parallel, config.precision, log, needed=needed)
        row_loader.source.reference_log_probs = log_probs.log_probs[: len(rows.train)]
        evaluator.rows.reference_log_probs = log_probs.log_probs[len(rows.train) :]
        return log_probs.save

    facts = data_facts(config.data, rows.chat, rows.drop_report, len(rows.train), len(rows.held_out), log)
    return Job(
        config, objective, loader, [evaluator] if rows.held_out else [],
        {"tokenizer": tokenizer.hash, "data": row_loader.source.hash, "held_out": evaluator.rows.hash}, facts,
        tokenizer, callbacks=callbacks, watchers=[Diagnostics(symptoms=SUPERVISED_SYMPTOMS)],
        prepare=compute_reference,
    )  # fmt: skip


def prepare_unpaired(config: KtoConfig, tokenizer: Tokenizer, loss: UnpairedLoss, log: LogFn) -> PreferenceData:
    """Prepare the labeled rows of a source with mismatched answers, and held-out ones."""
    data, drop_report = config.data, DropReport()
    chat = open_chat_template(data, tokenizer)
    learned, held_out = load_split_rows(
        data, read_unpaired, drop_report, builtin=builtin_preferences, limit=data.max_samples
    )
    parts = list[list[TokenizedPreference]]()
    for part in (repeat_by_weight(learned), held_out):
        rows = tokenize_preferences(chat, part, config.sequence_length, drop_report)
        seed, before = derive_seed(config.seed, f"mismatched {len(parts)}"), [row for rows in parts for row in rows]
        parts.append(
            add_mismatched_answers(rows, config.sequence_length, seed, more=before)
            if loss.needs_kl
            else repeat_answers(rows)
        )
    desirable = sum(one.margin > 0 for one in parts[0])
    counts = desirable, len(parts[0]) - desirable
    drop_report.note(balance_note(*counts, config.desirable_weight, config.undesirable_weight))
    return PreferenceData(chat, parts[0], parts[1], drop_report)


@contextmanager
def policy_context(config: KtoConfig, parallel: DistributedContext, objective: nn.Module) -> Iterator[None]:
    """Gather the policy whole, in the precision of the step."""
    with parallel.gather_model(objective), autocast(config.precision, parallel.device):
        yield


RECIPE = Recipe("kto", KtoConfig, build_kto)
