"""The settings of `quest train grpo`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llm_quest.objectives.divergence import KL
from llm_quest.objectives.policy_gradient import Correction
from llm_quest.objectives.surrogates import VARIANTS, Surrogate
from llm_quest.recipes.config import Strict, nearest
from llm_quest.recipes.parts import Count, Course, Few, Model, Rate

UNTRUE = ("top_k", "top_p", "min_p", "repetition_penalty")


class Warmup(Strict):
    """Fine-tuning on the task's demonstrations, which a fresh model needs before rewards can tell it anything. Best
    stopped where samples are right now and then: with too little no group is mixed, with too much none either."""

    steps: Count = Field(default=400, description="at most")
    until: float = Field(default=0.4, gt=0, le=1, description="stop when this share of samples is right, held out")
    rows: Count = 64
    lr: float = Field(default=3e-3, gt=0, le=1)


class Rollout(Strict):
    """What the policy writes, and how often it learns from it. Sampling is pure: temperature alone."""

    prompts: Count = Field(default=16, description="questions in a rollout")
    group: Count = Field(default=8, description="samples of each")
    new_tokens: Count = Field(default=32, description="the longest answer")
    temperature: float = Field(default=1.0, gt=0)
    updates: Count = Field(default=1, description="passes over a rollout (mu)")
    minibatches: Count = Field(default=1, description="optimiser steps per pass")
    draws: Count | None = Field(
        default=None,
        description="dynamic sampling: rounds of questions until all groups are mixed; null: 4 for dapo, 1",
    )
    overlong: Few = Field(default=0, description="the last tokens of the budget cost more and more (DAPO); 0: none do")
    filter_truncated: bool = Field(default=False, description="what the budget cut is not learned from")
    keep_flat: bool = Field(default=False, description="groups without spread stay in the batch")
    micro_tokens: Count = Field(default=8192, description="tokens in a micro-batch")
    at_once: Few = Field(default=0, description="rows sampled together; 0: all")

    @model_validator(mode="before")
    @classmethod
    def pure(cls, given: Any) -> Any:
        if isinstance(given, dict) and (found := [name for name in UNTRUE if name in given]):
            raise ValueError(
                f"{' and '.join(found)} would draw from another distribution than the one that is scored, and the "
                "ratio of the policy with itself would not be 1; leave it out and use temperature"
            )
        return given


class Divergence(Strict):
    """How the policy is held near its reference: the model it began as."""

    beta: Rate
    estimator: Literal["k1", "k2", "k3", "unbiased"] = "k3"
    place: Literal["loss", "reward"] = "loss"

    @model_validator(mode="after")
    def right_place(self) -> Divergence:
        if (self.estimator == "k1") != (self.place == "reward"):
            raise ValueError(
                "k1 in a loss has an expected gradient of 0: set kl.place=reward, or take k2, k3 or unbiased"
                if self.estimator == "k1"
                else f"kl.estimator={self.estimator} has no effect in the reward, where the log-ratio itself (k1) is "
                "right: set kl.estimator=k1"
            )
        return self


class Sampler(Strict):
    """The samples are scored again by the trainer, and what differs from the sampler's word is corrected."""

    limit: Rate = 2.0
    kind: Literal["truncate", "mask"] = "truncate"
    level: Literal["token", "sequence", "geometric"] = "token"


class Named(Strict):
    """A reward and its weight."""

    name: Literal["correct", "format", "random", "model"]
    weight: float = 1.0
    load: str | None = Field(default=None, description="the reward model's folder or run, for `model`")

    @model_validator(mode="after")
    def model_has_a_folder(self) -> Named:
        if (self.name == "model") != (self.load is not None):
            raise ValueError(
                "a reward model needs its folder: {name: model, load: FOLDER}"
                if self.name == "model"
                else f"load has no effect for the reward {self.name}; leave it out"
            )
        return self


class Held(Strict):
    """Accuracy on problems that are never trained on."""

    every: Few = Field(default=20, description="steps; 0: only at the end")
    problems: Count = Field(default=200, description="how many, answered greedily")
    samples: Few = Field(default=0, description="samples of each, for mean@k and pass@k")


class Grpo(Course):
    """A model and problems that can be checked in, a model that solves more of them out."""

    recipe: Literal["grpo"]
    task: str = Field(default="reverse", min_length=1, description="a task, options after a colon; or a GSM8K .jsonl")
    chat: bool = Field(default=False, description="ask through the model's chat template")
    model: Model
    warmup: Warmup | None = Field(default=None, description="for a fresh model: demonstrations first")
    variant: Literal["grpo", "dr_grpo", "dapo", "gspo", "gspo_token", "sapo", "cispo", "reinforce"] = "grpo"
    surrogate: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="the variant's own numbers: low, high, dual, delta; up, down; cap, floor"
    )
    count: Literal["sequences", "tokens", "horizon", "sums"] | None = Field(
        default=None, description="what the loss is divided by; null: as the variant has it"
    )
    advantages: Literal["std", "mean", "leave_one_out", "batch_std", "maxrl"] | None = Field(
        default=None, description="how rewards become advantages; null: as the variant has it"
    )
    rewards: tuple[Named, ...] = Field(
        default=(Named(name="correct"),), min_length=1, description="the first one says what is right"
    )
    separately: bool = Field(default=False, description="each reward made an advantage by itself (GDPO)")
    process: bool = Field(default=False, description="reward every step of the answer (chained)")
    rollout: Rollout = Rollout()
    kl: Divergence | None = None
    correction: Sampler | None = None
    stale: Rate | None = Field(default=None, description="off-policy sequence mask: nats a token")
    entropy: float = Field(default=0.0, ge=0, description="coefficient of the entropy bonus")
    evaluate: Held = Held()
    patience: Count = Field(default=30, description="steps after which a run that cannot learn is stopped")

    @model_validator(mode="after")
    def whole(self) -> Grpo:
        fresh = self.model.load is None
        if fresh and self.warmup is None:
            raise ValueError("a fresh model solves nothing that a reward could tell apart; give warmup={steps: 400}")
        if not fresh and self.warmup is not None:
            raise ValueError("warmup has no effect on a model that is loaded; leave it out (warmup=null)")
        if self.process and self.variant == "gspo":
            raise ValueError("process supervision gives each token its own advantage: take variant=gspo_token")
        if self.separately and len(self.rewards) < 2:
            raise ValueError("separately has no effect with one reward; leave it out")
        if self.process and (self.separately or self.rollout.overlong or self.advantages):
            raise ValueError("separately, overlong and advantages have no effect under process supervision; leave out")
        self.chosen_surrogate()
        return self

    def chosen_surrogate(self) -> Surrogate:
        """The variant's, with the numbers that were given."""
        base: Any = VARIANTS[self.variant].surrogate
        known = [field.name for field in dataclasses.fields(base) if field.name != "ratio"]
        for name in self.surrogate:
            if name not in known:
                raise ValueError(
                    f"surrogate.{name} has no effect on {self.variant}{nearest(name, known)}; it has "
                    f"{', '.join(known) or 'no numbers'}"
                )
        found: Surrogate = dataclasses.replace(base, **self.surrogate)
        return found

    @property
    def draws(self) -> int:
        return self.rollout.draws or (4 if self.variant == "dapo" else 1)

    def kl_term(self) -> KL | None:
        return KL(self.kl.beta, self.kl.estimator) if self.kl is not None and self.kl.place == "loss" else None

    def sampler_correction(self) -> Correction | None:
        part = self.correction
        return None if part is None else Correction(part.limit, part.kind, part.level)
