"""The keys of every recipe that trains a policy on its own samples: rollouts, loss, KL penalty."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from llm_quest.objectives.kl_penalty import KL_ESTIMATORS, KLPenalty
from llm_quest.objectives.policy_gradient import (
    CORRECTION_LEVELS,
    CORRECTION_MODES,
    TOKEN_WEIGHTS,
    ImportanceSamplingCorrection,
)
from llm_quest.objectives.surrogates import POLICY_VARIANTS, Surrogate
from llm_quest.objectives.value_loss import ValueLoss
from llm_quest.recipes.config_schema import NonNegativeInt, PositiveFloat, PositiveInt, RunConfig
from llm_quest.recipes.schema import Choice, LocalPath, StrictModel, did_you_mean
from llm_quest.rollouts.advantages import ADVANTAGE_ESTIMATORS
from llm_quest.rollouts.gae import GAE, VALUE_ESTIMATORS

UNSUPPORTED_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


class SamplerCorrectionConfig(StrictModel):
    """The trainer scores the samples again, and importance weights correct what differs from the sampler."""

    cap: PositiveFloat = Field(default=2.0, description="largest importance weight")
    mode: Annotated[str, Choice(CORRECTION_MODES)] = Field(
        default="truncate", description="larger weights are cut to the cap, or left out"
    )
    level: Annotated[str, Choice(CORRECTION_LEVELS)] = Field(
        default="token", description="one weight for each token, or for each sequence"
    )


class GaeConfig(StrictModel):
    """Generalized advantage estimation with a value head on the policy's own trunk, and the loss of its values."""

    gamma: float = Field(default=1.0, gt=0, le=1, description="discount of later rewards")
    lam: float = Field(default=0.95, ge=0, le=1, description="0: trust the next value; 1: the rewards alone")
    whiten_advantages: bool = Field(default=True, description="mean 0 and standard deviation 1 over the rollout")
    whiten_rewards: bool = Field(default=False, description="standard deviation 1 over the rollout's tokens")
    vf_coef: PositiveFloat = Field(default=0.1, description="weight of the value loss")
    cliprange_value: PositiveFloat | None = Field(
        default=0.2, description="how far a value may move in one rollout; null: not bounded"
    )


class ValueModelConfig(StrictModel):
    """A value model of PPO that shares nothing with the policy; its last layer becomes the value head."""

    load: LocalPath | None = Field(
        default=None, description="a reward model or language model; null: a copy of the policy as it begins"
    )


VALUE_MODEL_WORDS: dict[Any, Any] = {"shared": None, "separate": {}}


class PolicyConfig(RunConfig):
    """The keys of a recipe that trains a policy on its own samples."""

    num_train_epochs: PositiveFloat | None = Field(
        default=None, description="passes over the prompts, in place of max_steps, which then follows from them"
    )
    loss_type: Annotated[str, Choice(POLICY_VARIANTS)] = Field(
        default="grpo", description="the variant of the policy gradient"
    )
    loss_kwargs: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="the loss's own numbers: epsilon_low, epsilon_high, dual, delta; tau_positive, tau_negative; "
        "cap, floor",
    )
    loss_aggregation: Annotated[str, Choice(TOKEN_WEIGHTS)] | None = Field(
        default=None, description="what the loss is divided by; null: the loss's own"
    )
    advantage_estimator: Annotated[str, Choice({**ADVANTAGE_ESTIMATORS, **VALUE_ESTIMATORS})] | None = Field(
        default=None, description="how advantages are computed from rewards; null: the loss's own"
    )
    prompts_per_rollout: PositiveInt = Field(default=16, description="prompts in a rollout")
    num_generations: PositiveInt = Field(default=8, description="completions of each prompt (the group)")
    max_new_tokens: PositiveInt = Field(default=32, description="tokens of a completion, at most")
    temperature: float = Field(default=1.0, gt=0, description="of the samples; log-probabilities are taken at the same")
    num_iterations: PositiveInt = Field(default=1, description="passes over a rollout (mu)")
    num_mini_batches: PositiveInt = Field(default=1, description="optimizer steps per pass")
    dynamic_sampling_rounds: PositiveInt | None = Field(
        default=None,
        description="rounds of prompts until all groups have a spread (DAPO); null: 4 for dapo, else 1",
    )
    overlong_buffer_tokens: NonNegativeInt = Field(
        default=0, description="the last tokens of the budget cost more and more (DAPO); 0: none do"
    )
    mask_truncated_completions: bool = Field(
        default=False, description="completions that the budget cut are left out of the loss"
    )
    keep_zero_std_groups: bool | None = Field(
        default=None,
        description="groups without spread count in the loss's divisor; null: they do, where there are any",
    )
    micro_batch_tokens: PositiveInt = Field(default=4096, description="tokens in a micro-batch")
    generation_batch_size: NonNegativeInt = Field(default=0, description="rows sampled together; 0: all")
    kl_coef: float = Field(default=0.0, ge=0, description="weight of the divergence from the first policy; 0: off")
    kl_estimator: Annotated[str, Choice(KL_ESTIMATORS)] = Field(
        default="k3",
        description="how the divergence is estimated from samples (Schulman 2020)",
    )
    kl_placement: Literal["loss", "reward"] = Field(default="loss", description="where the divergence counts")
    sampler_correction: SamplerCorrectionConfig | None = Field(
        default=None, description="importance weights between sampler and trainer (cap, mode, level); null: none"
    )
    off_policy_mask_threshold: PositiveFloat | None = Field(
        default=None, description="nats per token beyond which a sequence is masked; null: none is"
    )
    entropy_coef: float = Field(default=0.0, ge=0, description="coefficient of the entropy bonus")
    attention_coef: float = Field(
        default=0.0,
        ge=0,
        description="weight of Reinforced Attention Learning: the last layer's attention is trained too",
    )
    gae: GaeConfig | None = Field(
        default=None, description="advantage_estimator=gae: its numbers and those of the value loss; null: the defaults"
    )
    value_model: Annotated[
        ValueModelConfig | None,
        BeforeValidator(lambda given: VALUE_MODEL_WORDS.get(given, given) if isinstance(given, str) else given),
    ] = Field(
        default=None,
        description="with gae: a value model of its own (separate, or load); null or shared: a head on the policy",
    )
    router_replay: bool = Field(
        default=False, description="experts: a rollout's choices are taken again while it is learned from"
    )
    diagnostics_patience: PositiveInt = Field(
        default=30, description="steps after which a run that cannot learn is stopped"
    )

    @model_validator(mode="before")
    @classmethod
    def reject_biased_sampling(cls, given: Any) -> Any:
        if isinstance(given, dict) and (biased := [name for name in UNSUPPORTED_SAMPLING if name in given]):
            raise ValueError(
                f"{' and '.join(biased)} would draw from another distribution than the one that is scored, and the "
                "ratio of the policy with itself would not be 1; leave it out and use temperature"
            )
        return given

    @model_validator(mode="after")
    def check_kl(self) -> PolicyConfig:
        if not self.kl_coef:
            for key in ("kl_estimator", "kl_placement"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} has no effect while kl_coef is 0; set kl_coef, or leave {key} out")
        elif (self.kl_estimator == "k1") != (self.kl_placement == "reward"):
            raise ValueError(
                "k1 in a loss has an expected gradient of 0: set kl_placement=reward, or take k2, k3 or unbiased"
                if self.kl_estimator == "k1"
                else f"kl_estimator={self.kl_estimator} has no effect in the reward, where the log-ratio itself (k1) "
                "is right: set kl_estimator=k1"
            )
        return self

    @model_validator(mode="after")
    def check_groups_and_budget(self) -> PolicyConfig:
        if self.overlong_buffer_tokens and self.overlong_buffer_tokens >= self.max_new_tokens:
            raise ValueError(
                f"overlong_buffer_tokens is {self.overlong_buffer_tokens}: give fewer tokens than the budget of "
                f"max_new_tokens {self.max_new_tokens}"
            )
        if self.sampling_rounds > 1 and self.keep_zero_std_groups:
            raise ValueError(
                "dynamic sampling (dynamic_sampling_rounds) leaves no group without spread to keep: leave "
                "keep_zero_std_groups out"
            )
        if self.num_generations < 2 and not self.by_steps and not self.has_value_head:
            raise ValueError(
                "num_generations is 1: a completion is compared with others of its group; take at least 2 (one alone "
                "has no spread)"
            )
        return self

    @property
    def scores_without_dropout(self) -> bool:
        return True

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_rollout

    @property
    def steps_per_batch(self) -> int:
        return self.num_iterations * self.num_mini_batches

    @property
    def estimator_name(self) -> str:
        return self.advantage_estimator or POLICY_VARIANTS[self.loss_type].advantages

    @property
    def has_value_head(self) -> bool:
        """Whether advantages come from values of each token, not from a comparison within the group."""
        return self.estimator_name in VALUE_ESTIMATORS

    @property
    def by_steps(self) -> bool:
        """Whether every step of an answer has a reward of its own (process supervision)."""
        return False

    @model_validator(mode="after")
    def check_loss_kwargs(self) -> PolicyConfig:
        self.build_surrogate()
        return self

    @model_validator(mode="after")
    def check_attention(self) -> PolicyConfig:
        if not self.attention_coef:
            return self
        if self.steps_per_batch == 1:
            raise ValueError(
                "attention_coef has no effect where a rollout is learned from once: the policy does not "
                "differ from itself; set num_iterations or num_mini_batches to 2 or more, or leave it out"
            )
        named = {technique["name"] for technique in self.all_techniques} & {"taps", "checkpointing"}
        if named:
            raise ValueError(f"attention_coef taps the last layer, which {named.pop()} disturbs: leave one out")
        if self.compile is True:
            raise ValueError(
                "attention_coef reads what is computed beside the pass, which a compiled pass cannot do: set "
                "compile=false"
            )
        return self

    @model_validator(mode="after")
    def check_gae(self) -> PolicyConfig:
        if self.gae is not None and not self.has_value_head:
            raise ValueError(
                f"gae has no effect with advantage_estimator={self.estimator_name}; set advantage_estimator=gae or "
                "loss_type=ppo, or leave it out"
            )
        if self.value_model is not None and not self.has_value_head:
            raise ValueError(
                f"value_model has no effect with advantage_estimator={self.estimator_name}; set "
                "advantage_estimator=gae or loss_type=ppo, or leave it out"
            )
        if self.has_value_head and self.by_steps:
            raise ValueError("process_supervision has advantages of its own: leave it out, or leave gae out")
        if self.has_value_head and self.loss_type == "gspo":
            raise ValueError("gae gives each token its own advantage: take loss_type=gspo_token")
        return self

    @property
    def max_completion_tokens(self) -> int:
        """Tokens that the policy writes for a prompt, at most."""
        return self.max_new_tokens

    @model_validator(mode="after")
    def check_router_replay(self) -> PolicyConfig:
        if not self.router_replay:
            return self
        if self.steps_per_batch == 1:
            raise ValueError(
                "router_replay has no effect where a rollout is learned from once: the routers choose as they did; set "
                "num_iterations or num_mini_batches to 2 or more, or leave it out"
            )
        if any(technique["name"] == "checkpointing" for technique in self.all_techniques):
            raise ValueError("router_replay cannot be combined with checkpointing, which routes again: leave one out")
        if self.compile is True:
            raise ValueError("router_replay changes what routers give, which a compiled pass cannot: set compile=false")
        return self

    def build_surrogate(self) -> Surrogate:
        """The surrogate of the variant, with the numbers of `loss_kwargs`."""
        base: Any = POLICY_VARIANTS[self.loss_type].surrogate
        known = [field.name for field in dataclasses.fields(base) if field.name != "importance_ratio"]
        for name in self.loss_kwargs:
            if name not in known:
                raise ValueError(
                    f"loss_kwargs.{name} has no effect on {self.loss_type}{did_you_mean(name, known)}; it has "
                    f"{', '.join(known) or 'no numbers'}"
                )
        surrogate: Surrogate = dataclasses.replace(base, **self.loss_kwargs)
        return surrogate

    @property
    def sampling_rounds(self) -> int:
        return self.dynamic_sampling_rounds or (4 if self.loss_type == "dapo" else 1)

    def build_kl(self) -> KLPenalty | None:
        return KLPenalty(self.kl_coef, self.kl_estimator) if self.kl_coef and self.kl_placement == "loss" else None

    def build_gae(self) -> GAE:
        part = self.gae or GaeConfig()
        return GAE(part.gamma, part.lam, part.whiten_advantages, part.whiten_rewards)

    def build_value_loss(self) -> ValueLoss | None:
        part = self.gae or GaeConfig()
        return ValueLoss(part.vf_coef, part.cliprange_value) if self.has_value_head else None

    def build_sampler_correction(self) -> ImportanceSamplingCorrection | None:
        part = self.sampler_correction
        return None if part is None else ImportanceSamplingCorrection(part.cap, part.mode, part.level)
