"""The settings of `quest train grpo`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from llm_quest.data.problems import parse_task
from llm_quest.hub.gsm8k import is_gsm8k
from llm_quest.recipes.config import StrictModel
from llm_quest.recipes.config_schema import ModelConfig, NonNegativeInt, PositiveInt
from llm_quest.recipes.policy_config import PolicyConfig


class WarmupConfig(StrictModel):
    """Fine-tuning on the task's demonstrations, which a fresh model needs before rewards can tell it anything. Best
    stopped where samples are right now and then: with too little no group is mixed, with too much none either."""

    max_steps: PositiveInt = Field(default=400, description="at most")
    target_accuracy: float = Field(
        default=0.4, gt=0, le=1, description="stop when this share of samples is right, held out"
    )
    batch_size: PositiveInt = 64
    learning_rate: float = Field(default=3e-3, gt=0, le=1)


class RewardSpec(StrictModel):
    """A reward and its weight."""

    name: Literal["correct", "format", "random", "model"]
    weight: float = 1.0
    load: str | None = Field(default=None, description="the reward model's folder or run, for `model`")

    @model_validator(mode="after")
    def check_reward_model_path(self) -> RewardSpec:
        if (self.name == "model") != (self.load is not None):
            raise ValueError(
                "a reward model needs its folder: {name: model, load: FOLDER}"
                if self.name == "model"
                else f"load has no effect for the reward {self.name}; leave it out"
            )
        return self


class GrpoConfig(PolicyConfig):
    """A model and problems that can be checked in, a model that solves more of them out."""

    recipe: Literal["grpo"]
    task: str = Field(
        default="reverse", min_length=1, description="a task, options after a colon; or gsm8k, or its .jsonl"
    )
    apply_chat_template: bool = Field(default=False, description="ask through the model's chat template")
    model: ModelConfig
    warmup: WarmupConfig | None = Field(default=None, description="for a fresh model: demonstrations first")
    rewards: tuple[RewardSpec, ...] = Field(
        default=(RewardSpec(name="correct"),), min_length=1, description="the first one says what is right"
    )
    normalize_rewards_separately: bool = Field(
        default=False, description="each reward made an advantage by itself (GDPO)"
    )
    process_supervision: bool = Field(default=False, description="reward every step of the answer (chained)")
    eval_steps: NonNegativeInt = Field(default=20, description="steps between evaluations; 0: only at the end")
    eval_problems: PositiveInt = Field(default=200, description="held-out problems, answered greedily")
    eval_num_samples: NonNegativeInt = Field(default=0, description="samples of each, for mean@k and pass@k")

    @property
    def by_steps(self) -> bool:
        return self.process_supervision

    @field_validator("task")
    @classmethod
    def known_task(cls, task: str) -> str:
        if not is_gsm8k(task):
            parse_task(task)
        return task

    @model_validator(mode="after")
    def check_combination(self) -> GrpoConfig:
        fresh = self.model.load is None
        if fresh and is_gsm8k(self.task):
            raise ValueError("a fresh model cannot be warmed up on GSM8K; give model.load=FOLDER")
        if fresh and self.warmup is None:
            raise ValueError(
                "a fresh model solves nothing that a reward could tell apart; give warmup={max_steps: 400}"
            )
        if not fresh and self.warmup is not None:
            raise ValueError("warmup has no effect on a model that is loaded; leave it out (warmup=null)")
        if self.process_supervision and self.loss_type == "gspo":
            raise ValueError("process supervision gives each token its own advantage: take loss_type=gspo_token")
        if self.normalize_rewards_separately and len(self.rewards) < 2:
            raise ValueError("normalize_rewards_separately has no effect with one reward; leave it out")
        if self.process_supervision and (
            self.normalize_rewards_separately or self.overlong_buffer_tokens or self.advantage_estimator
        ):
            raise ValueError(
                "normalize_rewards_separately, overlong_buffer_tokens and advantage_estimator have no effect under "
                "process_supervision; leave them out"
            )
        return self
