"""Assembles rollouts, objective and evaluators for a recipe that trains a policy on its own samples.

The reference of a KL term is the model as it began: a frozen copy, or with LoRA the same memory with the adapters
off."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from llm_quest.contracts import Callback
from llm_quest.data.problems import Problem
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.eval.evaluators import save_samples
from llm_quest.eval.problems import ProblemAccuracy, evaluate_problems
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.attention_divergence import compute_attention_policy
from llm_quest.objectives.log_probs import token_log_probs
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.objectives.surrogates import POLICY_VARIANTS
from llm_quest.recipes.auto import resolve_auto, resolve_precision
from llm_quest.recipes.finetuning import apply_config_techniques, can_share_prompts
from llm_quest.recipes.policy import PolicyConfig
from llm_quest.recipes.recipe import Context, LogFn
from llm_quest.recipes.run import init_run_dir
from llm_quest.rollouts.advantages import ADVANTAGE_ESTIMATORS
from llm_quest.rollouts.reward_pipeline import RewardPipeline, StepRewards, WeightedReward
from llm_quest.rollouts.rollouts import PromptSource, RolloutLoader, RolloutPlan, RowScorer
from llm_quest.rollouts.sampler import Sampler
from llm_quest.techniques.attention_taps import AttentionTaps
from llm_quest.techniques.lora import disable_adapter, is_adapter
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.state_dict import derive_seed
from llm_quest.train.step import autocast

PolicyConfigT = TypeVar("PolicyConfigT", bound=PolicyConfig)


def resolve_policy_config(config: PolicyConfigT, parallel: DistributedContext, log: LogFn) -> PolicyConfigT:
    """The config with precision and compile decided."""
    if config.precision == "auto" and config.loss_type.startswith("gspo"):
        config = config.model_copy(update={"precision": "fp32"})  # its clip range is finer than bfloat16's rounding
    return resolve_auto(config, parallel.device, log)


def open_policy_run(config: PolicyConfigT, context: Context) -> PolicyConfigT:
    """The config without any `auto`; it is written to the run folder, where warm-ups run before the policy's own run
    begins."""
    config = resolve_policy_config(config, context.parallel, context.log)
    if not context.planning:
        init_run_dir(config, context.run_dir, context.parallel)
    return config


@dataclass(frozen=True)
class PolicySetup:
    """The objective, the rollouts, and the callbacks of techniques."""

    objective: PolicyGradientLoss
    rollouts: RolloutLoader
    callbacks: list[Callback]


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
    read_all: bool = False,
) -> PolicySetup:
    """From a model that stands on its device. rewards, normalize_rewards_separately, steps: see `RewardPipeline`.
    read_all: see `RolloutLoader`; an entropy bonus wants it in any case."""
    initial_model = copy.deepcopy(model).requires_grad_(False) if config.kl_coef else None
    adapted_before = any(map(is_adapter, model.spec.techniques))
    callbacks = apply_config_techniques(config, model, log)
    reference_is_adapter_free = any(map(is_adapter, model.spec.techniques)) and not adapted_before
    reference = (
        None
        if initial_model is None
        else log_prob_scorer(model, config, adapters_disabled=True)
        if reference_is_adapter_free
        else log_prob_scorer(initial_model, config)
    )
    scoring = RewardPipeline(
        rewards=tuple(rewards),
        estimator=ADVANTAGE_ESTIMATORS[config.advantage_estimator or POLICY_VARIANTS[config.loss_type].advantages],
        per_reward_advantages=normalize_rewards_separately,
        max_new_tokens=config.max_new_tokens,
        overlong_window=config.overlong_buffer_tokens,
        filter_truncated=config.mask_truncated_completions,
        step_rewards=steps,
        keep_uniform_groups=config.keep_zero_std_groups is not False,
    )
    if config.attention_coef:
        tap_last_layer(model)
    writer, plan = policy_sampler(config, model, tokenizer, parallel), rollout_plan(config)
    scorers = {
        **({"old_log_probs": log_prob_scorer(model, config)} if config.sampler_correction is not None else {}),
        **({"reference_log_probs": reference} if reference is not None else {}),
        **({"attention_maps": attention_scorer(model)} if config.attention_coef else {}),
    }
    loader = RolloutLoader(
        model, make_question, writer, scoring, plan, scorers=scorers, processes=parallel,
        read_all=read_all or config.entropy_coef > 0,
    )  # fmt: skip
    return PolicySetup(policy_objective(config, model), loader, callbacks)


def policy_objective(config: PolicyConfig, model: Decoder) -> PolicyGradientLoss:
    return PolicyGradientLoss(
        model,
        config.build_surrogate(),
        count=(count := config.loss_aggregation or POLICY_VARIANTS[config.loss_type].count),
        horizon=config.max_new_tokens if count == "horizon" else None,
        temperature=config.temperature,
        kl=config.build_kl(),
        entropy_coef=config.entropy_coef,
        attention_coef=config.attention_coef,
        correction=config.build_sampler_correction(),
        off_policy_delta=config.off_policy_mask_threshold,
    )


def rollout_plan(config: PolicyConfig) -> RolloutPlan:
    """Prompts that are shared leave no whole rows of attention to learn."""
    return RolloutPlan(
        prompts_per_rollout=config.prompts_per_rollout,
        num_generations=config.num_generations,
        num_iterations=config.num_iterations,
        minibatches=config.num_mini_batches,
        max_sampling_rounds=config.sampling_rounds,
        max_micro_batch_tokens=config.micro_batch_tokens,
        share_prompts=can_share_prompts(config) and not config.attention_coef,
        kl_coef=config.kl_coef if config.kl_placement == "reward" else 0.0,
        seed=derive_seed(config.seed, "sampling"),
    )


def policy_sampler(config: PolicyConfig, model: Decoder, tokenizer: Tokenizer, parallel: DistributedContext) -> Sampler:
    """Samples as they are scored: same temperature, same precision; ends at every end that the model knows."""
    own = model.generation_config.eos_token_ids if model.generation_config is not None else ()
    return Sampler(
        tokenizer=tokenizer,
        eos_token_ids=tuple(sorted({*own, *tokenizer.eos_token_ids})),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        autocast_context=partial(autocast, resolve_precision(config.precision, parallel.device).value, parallel.device),
        batch_size=config.generation_batch_size,
    )


def tap_last_layer(model: Decoder) -> None:
    """Records the attention of the last layer, which is trained."""
    try:
        AttentionTaps((-1,))(model)
    except ValueError as error:
        raise UsageError(f"attention cannot be learned on this model: {error}") from None


def attention_scorer(model: Decoder) -> RowScorer:
    return lambda batch: compute_attention_policy(model, batch.input_ids)


def log_prob_scorer(model: Decoder, config: PolicyConfig, *, adapters_disabled: bool = False) -> RowScorer:
    """Log-probabilities at the sampling temperature. adapters_disabled: of the model without its adapters."""

    def score(batch: Any) -> torch.Tensor:
        with disable_adapter(model) if adapters_disabled else nullcontext():
            return token_log_probs(model, batch, config.temperature)

    return score


@dataclass
class ProblemEvaluator:
    """accuracy (greedy), and from samples mean@n and pass@k; the first answers go to
    samples/step-00000020.json."""

    problems: Sequence[Problem]
    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]
    interval: int
    max_new_tokens: int
    num_samples: int
    temperature: float
    seed: int
    samples_dir: Path | None = None
    name: str = "eval"

    def evaluate(self, model: Decoder, step: int) -> Mapping[str, float]:
        found = self.accuracy(model)
        if self.samples_dir is not None:
            sample_rows = [{"prompt": p, "text": text, "wanted": answer} for p, text, answer, _ in found.examples]
            save_samples(self.samples_dir, step, sample_rows)
        passes = {f"pass@{k}": value for k, value in found.pass_at_k.items()}
        mean = {f"mean@{found.num_samples}": found.mean_at_k} if found.num_samples else {}
        return {"accuracy": found.greedy_accuracy.share, "length": found.mean_tokens, **mean, **passes}

    def accuracy(self, model: Decoder) -> ProblemAccuracy:
        return evaluate_problems(
            model,
            self.tokenizer,
            self.problems,
            num_samples=self.num_samples,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            encode_prompt=self.encode,
        )


@dataclass
class RatioRangeEvaluator:
    """The smallest and largest importance ratio, before clipping, since the last row of metrics."""

    objective: PolicyGradientLoss
    interval: int
    name: str = "ratio"

    def evaluate(self, model: Decoder, step: int) -> Mapping[str, float]:
        low, high = self.objective.ratio_range.tolist()
        self.objective.ratio_range = torch.ones(2)
        return {"min": low, "max": high}
