"""Rollouts and objective of recipes that train a policy on its own samples.

The reference of a KL term is the initial model: a frozen copy, or with LoRA the same memory with the adapters off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from llm_quest.contracts import Callback, LogFn
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.generation.stopping import end_token_ids
from llm_quest.layers.router_replay import find_routers, record_routing, stack_routing
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.attention_divergence import compute_attention_policy
from llm_quest.objectives.log_probs import token_log_probs
from llm_quest.objectives.next_token import batch_hidden_states
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.objectives.surrogates import POLICY_VARIANTS
from llm_quest.recipes.auto import resolve_auto, resolve_precision
from llm_quest.recipes.finetuning import apply_config_techniques, can_share_prompts
from llm_quest.recipes.policy import PolicyConfig
from llm_quest.recipes.policy_prompts import log_long_prompts
from llm_quest.recipes.recipe import Context
from llm_quest.recipes.reference_model import ReferenceContext, has_adapter, make_initial_reference
from llm_quest.recipes.run_folder import init_run_dir
from llm_quest.recipes.value_model import add_value_estimate, init_value_model, value_scorer
from llm_quest.rollouts.advantages import ADVANTAGE_ESTIMATORS, RewardPipeline, StepRewards, WeightedReward
from llm_quest.rollouts.gae import VALUE_ESTIMATORS
from llm_quest.rollouts.rollouts import PromptSource, RolloutLoader, RolloutPlan, RowScorer, ValueBaseline
from llm_quest.rollouts.sampler import ContextFactory, RolloutSampler, Sampler
from llm_quest.techniques.attention_taps import AttentionTaps
from llm_quest.techniques.value_head import find_value_model
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import derive_seed
from llm_quest.train.step import autocast

PolicyConfigT = TypeVar("PolicyConfigT", bound=PolicyConfig)


def open_policy_run(config: PolicyConfigT, context: Context) -> PolicyConfigT:
    """Resolve the config and write it to the run folder, where warm-ups run before the policy's own run."""
    if config.precision == "auto" and config.loss_type.startswith("gspo"):
        config = config.model_copy(update={"precision": "fp32"})  # its clip range is finer than bfloat16's rounding
    config = resolve_auto(config, context)
    if not context.planning:
        init_run_dir(config, context)
    return config


@dataclass(frozen=True)
class PolicySetup:
    """The objective, the rollouts, the callbacks of techniques, and a context in which a sharded policy is whole."""

    objective: PolicyGradientLoss
    rollouts: RolloutLoader
    callbacks: list[Callback]
    whole_policy: ContextFactory

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that FSDP shards one by one."""
        model: Any = self.objective.model
        own = find_value_model(model)
        return [*model.blocks, *(own.blocks if own is not None else ())]


def build_policy_setup(
    config: PolicyConfig,
    model: Decoder,
    tokenizer: Tokenizer,
    make_question: PromptSource,
    rewards: Sequence[WeightedReward],
    parallel: DistributedContext,
    log: LogFn,
    *,
    normalize_rewards_separately: bool = False,
    steps: StepRewards | None = None,
    wrap_sampler: Callable[[Sampler], RolloutSampler] = lambda sampler: sampler,
) -> PolicySetup:
    """Build rollouts and objective for a model on its device. rewards, normalize_rewards_separately, steps: see
    `RewardPipeline`. wrap_sampler: makes a sampler of episodes from the one of answers."""
    if normalize_rewards_separately and config.has_value_head:
        raise UsageError(
            "normalize_rewards_separately compares samples within a group, which gae does not: leave one out"
        )
    adapted_before = has_adapter(model)
    own = init_value_model(config, model, tokenizer)
    callbacks = apply_config_techniques(config, model, log)
    initial = make_initial_reference(model, adapted_before=adapted_before) if config.kl_coef else None
    scoring = RewardPipeline(
        rewards=tuple(rewards),
        estimator={**ADVANTAGE_ESTIMATORS, **VALUE_ESTIMATORS}[config.estimator_name],
        per_reward_advantages=normalize_rewards_separately,
        max_new_tokens=config.max_new_tokens,
        overlong_window=config.overlong_buffer_tokens,
        filter_truncated=config.mask_truncated_completions,
        step_rewards=steps,
        keep_uniform_groups=config.keep_zero_std_groups is not False,
    )
    if config.attention_coef:
        tap_last_layer(model)
    if config.router_replay and not find_routers(model):
        raise UsageError("router_replay has no effect: this model has no experts; leave it out")
    add_value_estimate(config, model, own)
    objective = policy_objective(config, model)
    whole_policy = partial(parallel.gather_model, objective)
    writer = wrap_sampler(policy_sampler(config, model, tokenizer, parallel))
    plan = rollout_plan(config, parallel)
    scorers = {
        **(
            {"old_log_probs": log_prob_scorer(lambda: nullcontext(model), config)}
            if config.sampler_correction is not None
            else {}
        ),
        **({"reference_log_probs": log_prob_scorer(initial, config)} if initial is not None else {}),
        **({"attention_maps": attention_scorer(model)} if config.attention_coef else {}),
    }
    loader = RolloutLoader(
        model, log_long_prompts(make_question, model.config.max_position_embeddings - config.max_new_tokens, log),
        writer, scoring, plan, scorers=scorers, processes=parallel, read_all=config.entropy_coef > 0,
        routing_scorer=routing_scorer(model) if config.router_replay else None, whole_policy=whole_policy,
        value_baseline=ValueBaseline(value_scorer(model), config.build_gae()) if config.has_value_head else None,
    )  # fmt: skip
    return PolicySetup(objective, loader, callbacks, whole_policy)


def policy_objective(config: PolicyConfig, model: Decoder) -> PolicyGradientLoss:
    return PolicyGradientLoss(
        model,
        config.build_surrogate(),
        count=(count := config.loss_aggregation or POLICY_VARIANTS[config.loss_type].count),
        horizon=config.max_completion_tokens if count == "horizon" else None,
        temperature=config.temperature,
        kl=config.build_kl(),
        entropy_coef=config.entropy_coef,
        attention_coef=config.attention_coef,
        correction=config.build_sampler_correction(),
        off_policy_delta=config.off_policy_mask_threshold,
        value_loss=config.build_value_loss(),
    )


def rollout_plan(config: PolicyConfig, parallel: DistributedContext) -> RolloutPlan:
    """The plan of a rollout. Prompts are not shared where whole rows of attention are trained, nor under FSDP2, which
    shards a block again after its first pass."""
    share_prompts = (
        can_share_prompts(config)
        and not (config.attention_coef or config.router_replay)
        and parallel.strategy != "fsdp"
    )
    return RolloutPlan(
        prompts_per_rollout=config.prompts_per_rollout,
        num_generations=config.num_generations,
        num_iterations=config.num_iterations,
        minibatches=config.num_mini_batches,
        max_sampling_rounds=config.sampling_rounds,
        max_micro_batch_tokens=config.micro_batch_tokens,
        share_prompts=share_prompts,
        kl_coef=config.kl_coef if config.kl_placement == "reward" else 0.0,
        seed=derive_seed(config.seed, "sampling"),
    )


def policy_sampler(config: PolicyConfig, model: Decoder, tokenizer: Tokenizer, parallel: DistributedContext) -> Sampler:
    """The sampler of a policy: with the temperature and the precision of scoring, and every end token of the model."""
    return Sampler(
        tokenizer=tokenizer,
        eos_token_ids=end_token_ids(model, tokenizer),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        autocast_context=partial(autocast, resolve_precision(config.precision, parallel.device).value, parallel.device),
        batch_size=config.generation_batch_size,
    )


def tap_last_layer(model: Decoder) -> None:
    """Attach a tap to the last layer, whose attention is trained."""
    try:
        AttentionTaps((-1,))(model)
    except ValueError as error:
        raise UsageError(f"attention cannot be learned on this model: {error}") from None


def routing_scorer(model: Decoder) -> RowScorer:
    """A scorer of the experts that the routers choose for every token."""

    def score(batch: Any) -> torch.Tensor:
        with record_routing(model) as chosen:
            batch_hidden_states(model, batch)
        return stack_routing(chosen, len(batch.input_ids))

    return score


def attention_scorer(model: Decoder) -> RowScorer:
    return lambda batch: compute_attention_policy(model, batch.input_ids)


def log_prob_scorer(scored: ReferenceContext, config: PolicyConfig) -> RowScorer:
    """A scorer of log-probabilities at the sampling temperature. scored: a context that gives the model."""

    def score(batch: Any) -> torch.Tensor:
        with scored() as model:
            return token_log_probs(model, batch, config.temperature)

    return score
