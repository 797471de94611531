"""What every recipe that learns from its own samples has in common: the rollout, the objective, what holds the policy
near its reference."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llm_quest.objectives.kl_penalty import KL_ESTIMATORS, KLPenalty
from llm_quest.objectives.policy_gradient import TOKEN_WEIGHTS, ImportanceSamplingCorrection
from llm_quest.objectives.surrogates import POLICY_VARIANTS, Surrogate
from llm_quest.recipes.choice import Choice
from llm_quest.recipes.config import StrictModel, did_you_mean
from llm_quest.recipes.config_schema import NonNegativeInt, PositiveFloat, PositiveInt, RunConfig
from llm_quest.rollouts.advantages import ADVANTAGE_ESTIMATORS

UNSUPPORTED_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


class RolloutConfig(StrictModel):
    """What the policy writes, and how often it learns from it. Sampling is pure: temperature alone."""

    prompts: PositiveInt = Field(default=16, description="questions in a rollout")
    group: PositiveInt = Field(default=8, description="samples of each")
    new_tokens: PositiveInt = Field(default=32, description="the longest answer")
    temperature: float = Field(default=1.0, gt=0)
    updates: PositiveInt = Field(default=1, description="passes over a rollout (mu)")
    minibatches: PositiveInt = Field(default=1, description="optimiser steps per pass")
    draws: PositiveInt | None = Field(
        default=None,
        description="dynamic sampling: rounds of questions until all groups are mixed; null: 4 for dapo, 1",
    )
    overlong: NonNegativeInt = Field(
        default=0, description="the last tokens of the budget cost more and more (DAPO); 0: none do"
    )
    filter_truncated: bool = Field(default=False, description="what the budget cut is not learned from")
    keep_flat: bool | None = Field(
        default=None,
        description="groups without spread count in the loss's divisor; null: they do, where there are any",
    )
    micro_tokens: PositiveInt = Field(default=4096, description="tokens in a micro-batch")
    at_once: NonNegativeInt = Field(default=0, description="rows sampled together; 0: all")

    @model_validator(mode="before")
    @classmethod
    def reject_biased_sampling(cls, given: Any) -> Any:
        if isinstance(given, dict) and (found := [name for name in UNSUPPORTED_SAMPLING if name in given]):
            raise ValueError(
                f"{' and '.join(found)} would draw from another distribution than the one that is scored, and the "
                "ratio of the policy with itself would not be 1; leave it out and use temperature"
            )
        return given


class KlConfig(StrictModel):
    """How the policy is held near its reference: the model it began as."""

    beta: PositiveFloat
    estimator: Annotated[str, Choice(KL_ESTIMATORS)] = "k3"
    place: Literal["loss", "reward"] = "loss"

    @model_validator(mode="after")
    def check_placement(self) -> KlConfig:
        if (self.estimator == "k1") != (self.place == "reward"):
            raise ValueError(
                "k1 in a loss has an expected gradient of 0: set kl.place=reward, or take k2, k3 or unbiased"
                if self.estimator == "k1"
                else f"kl.estimator={self.estimator} has no effect in the reward, where the log-ratio itself (k1) is "
                "right: set kl.estimator=k1"
            )
        return self


class SamplerCorrectionConfig(StrictModel):
    """The samples are scored again by the trainer, and what differs from the sampler's word is corrected."""

    limit: PositiveFloat = 2.0
    kind: Literal["truncate", "mask"] = "truncate"
    level: Literal["token", "sequence", "geometric"] = "token"


class PolicyConfig(RunConfig):
    """How a policy learns from what it wrote."""

    variant: Annotated[str, Choice(POLICY_VARIANTS)] = "grpo"
    surrogate: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="the variant's own numbers: low, high, dual, delta; up, down; cap, floor"
    )
    count: Annotated[str, Choice(TOKEN_WEIGHTS)] | None = Field(
        default=None, description="what the loss is divided by; null: as the variant has it"
    )
    advantages: Annotated[str, Choice(ADVANTAGE_ESTIMATORS)] | None = Field(
        default=None, description="how rewards become advantages; null: as the variant has it"
    )
    rollout: RolloutConfig = RolloutConfig()
    kl: KlConfig | None = None
    correction: SamplerCorrectionConfig | None = None
    stale: PositiveFloat | None = Field(default=None, description="off-policy sequence mask: nats a token")
    entropy: float = Field(default=0.0, ge=0, description="coefficient of the entropy bonus")
    attention: float = Field(
        default=0.0,
        ge=0,
        description="weight of Reinforced Attention Learning: where the last layer looks is learned too",
    )
    patience: PositiveInt = Field(default=30, description="steps after which a run that cannot learn is stopped")

    @model_validator(mode="after")
    def whole_in_every_process(self) -> PolicyConfig:
        """The policy samples token by token, every process at its own pace: it has to be whole in each of them."""
        if self.parallel == "fsdp":
            raise ValueError("a policy samples from the whole model, which FSDP2 takes apart: set parallel=ddp")
        return self

    @model_validator(mode="after")
    def groups_and_budget(self) -> PolicyConfig:
        part = self.rollout
        if part.overlong and part.overlong >= part.new_tokens:
            raise ValueError(
                f"rollout.overlong is {part.overlong}: give fewer tokens than the budget of rollout.new_tokens "
                f"{part.new_tokens}"
            )
        if self.sampling_rounds > 1 and part.keep_flat:
            raise ValueError(
                "dynamic sampling (rollout.draws) leaves no group without spread to keep: leave rollout.keep_flat out"
            )
        if part.group < 2 and not self.by_steps:
            raise ValueError(
                "rollout.group is 1: a sample is judged beside its siblings; take at least 2 (one alone has no spread)"
            )
        return self

    @property
    def by_steps(self) -> bool:
        """Is every step of an answer rewarded by itself?"""
        return False

    @model_validator(mode="after")
    def check_loss_kwargs(self) -> PolicyConfig:
        self.build_surrogate()
        return self

    @model_validator(mode="after")
    def check_attention(self) -> PolicyConfig:
        if not self.attention:
            return self
        if self.rollout.updates * self.rollout.minibatches == 1:
            raise ValueError(
                "attention has no effect where a rollout is learned from once: the policy does not "
                "differ from itself; set rollout.updates or rollout.minibatches to 2 or more, or leave it out"
            )
        named = {one["name"] for one in self.techniques} & {"taps", "checkpointing"}
        if named:
            raise ValueError(f"attention taps the last layer, which {named.pop()} disturbs: leave one out")
        if self.compile is True:
            raise ValueError("attention is read beside the pass, which a compiled pass cannot do: set compile=false")
        return self

    def build_surrogate(self) -> Surrogate:
        """The variant's, with the numbers that were given."""
        base: Any = POLICY_VARIANTS[self.variant].surrogate
        known = [field.name for field in dataclasses.fields(base) if field.name != "ratio"]
        for name in self.surrogate:
            if name not in known:
                raise ValueError(
                    f"surrogate.{name} has no effect on {self.variant}{did_you_mean(name, known)}; it has "
                    f"{', '.join(known) or 'no numbers'}"
                )
        found: Surrogate = dataclasses.replace(base, **self.surrogate)
        return found

    @property
    def sampling_rounds(self) -> int:
        return self.rollout.draws or (4 if self.variant == "dapo" else 1)

    def build_kl(self) -> KLPenalty | None:
        return KLPenalty(self.kl.beta, self.kl.estimator) if self.kl is not None and self.kl.place == "loss" else None

    def build_sampler_correction(self) -> ImportanceSamplingCorrection | None:
        part = self.correction
        return None if part is None else ImportanceSamplingCorrection(part.limit, part.kind, part.level)
