"""The settings of `quest train iterative`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llm_quest.recipes.config import StrictModel
from llm_quest.recipes.config_schema import PositiveInt
from llm_quest.recipes.grpo_config import GrpoConfig, RewardSpec


class RewardModelConfig(StrictModel):
    """The reward model and how it is trained on. Labels come from the task's verifier."""

    load: str | None = Field(default=None, description="a reward model; null: one is made from the first policy")
    max_steps: PositiveInt = Field(default=60, description="of training on, in each iteration")
    batch_size: PositiveInt = Field(default=32, description="comparisons in a step")
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    num_prompts: PositiveInt = Field(default=128, description="asked of the newest policy for comparisons")
    replay_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="the part of a batch that earlier iterations wrote"
    )


class IterativeConfig(GrpoConfig):
    """GRPO with a reward model that learns from what the policy has become (DeepSeekMath, algorithm 1)."""

    recipe: Literal["iterative"]  # type: ignore[assignment]
    num_outer_iterations: PositiveInt = 2
    reward_model: RewardModelConfig = RewardModelConfig()

    @model_validator(mode="after")
    def check_single_reward(self) -> IterativeConfig:
        if self.rewards != (RewardSpec(name="correct"),):
            raise ValueError(
                "rewards has no effect here: the reward model is the reward (reward_model.load); leave it out"
            )
        if self.process_supervision:
            raise ValueError(
                "process_supervision has no effect here: the reward model judges whole answers; leave it out"
            )
        return self
