"""`quest train dpo`: preferences -> a model that gives the better answer more probability than it had and the worse one
less, without a reward model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_quest.contracts import Callback, Loader
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.preference_pairs import PreferenceBatch
from llm_quest.objectives.preference import PreferenceLoss, relative_log_probs, sequence_log_probs
from llm_quest.recipes.auto import resolve_precision
from llm_quest.recipes.job import (
    LogFn,
    TrainingJob,
    apply_config_techniques,
    can_share_prompts,
    data_facts,
    load_for_finetuning,
    read_chat_template,
    run_job,
    set_generation_eos,
)
from llm_quest.recipes.preference_data import PairsEvaluator, pairs_loader, prepare_preferences
from llm_quest.recipes.reference_model import SyncedReference, reference_log_probs
from llm_quest.recipes.run import RunOutcome, init_distributed, require_context
from llm_quest.recipes.tuning_config import DpoConfig
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.techniques.lora import disable_adapter, require_adapters
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.state_dict import derive_seed


def train_dpo(
    config: DpoConfig, settings: RawConfig, out: Path, *, resume: str = "auto", env: Mapping[str, Any] | None = None,
    quiet: bool = False, log: LogFn = print,
) -> RunOutcome:  # fmt: skip
    """Run the recipe in a folder. Every process of a torchrun calls this."""
    with init_distributed(config, config.batch_size) as parallel:
        leader_log = log if parallel.is_main_process else lambda text: None
        job = build_dpo_job(config, out, parallel, leader_log)
        return run_job(job, config, out, resume, env or {}, quiet, leader_log, parallel)


def build_dpo_job(config: DpoConfig, out: Path, parallel: DistributedContext, log: LogFn) -> TrainingJob:
    """Model, pairs, reference, objective and feed."""
    model, tokenizer = load_for_finetuning(config.model)
    require_context(config.sequence_length, model.config.max_position_embeddings)
    seed = derive_seed(config.seed, "flips")
    pairs = prepare_preferences(
        config.data, ChatTemplate(tokenizer, read_chat_template(config.data)), config.sequence_length, seed
    )
    set_generation_eos(model, tokenizer, (answer[-1] for one in pairs.train for answer in one.answers))
    callbacks = apply_config_techniques(config, model, log)
    loss = config.build_loss()
    objective = PreferenceLoss(model, loss, average_log_prob=config.average_log_prob)
    row_loader = pairs_loader(config, pairs, parallel)
    share = can_share_prompts(config) and parallel.strategy != "fsdp"  # which shards a block again after its first pass
    row_loader.source.share_prompts = share
    loader: Loader = row_loader
    if config.sync_ref_model:
        synced_reference = SyncedReference(
            row_loader, model.to(parallel.device), out,
            sync_steps=config.ref_model_sync_steps, mixup_alpha=config.ref_model_mixup_alpha, save_total_limit=config.save_total_limit, leader=parallel.is_main_process,
        )  # fmt: skip
        objective.reference, loader, callbacks = synced_reference, synced_reference, [*callbacks, synced_reference]
    elif not config.precompute_ref_log_probs:
        require_adapters(model)
        objective.reference = lambda batch: log_probs_without_adapters(model, batch)

    def compute_reference() -> Callable[[Path], None]:
        """The reference's log-probabilities: of the held-out pairs always, so that what is measured on them stays
        comparable; of the training pairs where nothing else computes them."""
        if not loss.needs_reference:
            return lambda folder: None
        kind = resolve_precision(config.precision, parallel.device).value
        mine = [] if objective.reference is not None else list(pairs.train)
        found = reference_log_probs(model, [*mine, *pairs.held_out], out, parallel, kind, log, share_prompts=share)
        row_loader.source.reference_log_probs = found.log_probs[: len(mine)] or None
        evaluator.pairs.reference_log_probs = found.log_probs[len(mine) :]
        return found.save

    def implicit_rewards(model: Any, batch: PreferenceBatch) -> Tensor:
        """beta (log p - log p_ref) of each answer, as the loss has it."""
        reference = batch.reference_log_probs if loss.needs_reference else None
        log_probs = sequence_log_probs(model, batch)
        return loss.beta * relative_log_probs(log_probs, reference, batch.targets, average=loss.average_log_prob)

    evaluator = PairsEvaluator(pairs.held_out, config.eval_steps, implicit_rewards)
    data_info = data_facts(config.data, pairs.chat, pairs.drop_report, len(pairs.train), len(pairs.held_out), log)
    all_callbacks: list[Callback] = list(callbacks)
    return TrainingJob(
        objective,
        loader,
        lambda run: [evaluator],
        tokenizer,
        data_info,
        {"data": row_loader.source.hash},
        all_callbacks,
        compute_reference,
    )


def log_probs_without_adapters(model: Any, batch: PreferenceBatch) -> Tensor:
    """The reference is the policy with its adapters off."""
    with disable_adapter(model):
        return sequence_log_probs(model, batch)
