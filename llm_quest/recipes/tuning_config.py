"""The settings of the recipes that go on from a model: `sft`, `reward`, `dpo`, `classify`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llm_quest.objectives.preference import PREFERENCE_LOSSES, PairwiseLoss, make_preference_loss
from llm_quest.recipes.choice import Choice
from llm_quest.recipes.config import StrictModel
from llm_quest.recipes.config_schema import (
    BatchedConfig,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TextBatchedConfig,
)
from llm_quest.recipes.distillation import TeacherConfig
from llm_quest.recipes.number_token_loss import NumberTokenLossConfig


class StartModelConfig(StrictModel):
    """The model to go on from; its tokenizer and chat template come with it."""

    load: str = Field(min_length=1, description="a run folder, a Hugging Face folder or a hub id")


class ConversationDataConfig(StrictModel):
    """Conversations, and how they are laid out."""

    source: str = Field(
        default="builtin", min_length=1, description="builtin, or a .json, .jsonl, .csv or .tsv file of rows"
    )
    held_out: float = Field(default=0.1, gt=0, lt=0.5, description="the part of the questions that is never trained on")
    max_samples: PositiveInt | None = Field(default=None, description="use so many rows; null: all")
    chat_template_path: str | None = Field(
        default=None, min_length=1, description="a file with a chat template, in place of the model's own"
    )


class AnswerSamplesConfig(StrictModel):
    """Held-out questions that the model answers during the run."""

    every_steps: NonNegativeInt = Field(default=100, description="steps; 0: none")
    num_prompts: PositiveInt = Field(default=4, description="how many questions")
    max_new_tokens: PositiveInt = Field(default=64, description="tokens of an answer, at most")
    temperature: float = Field(default=0.0, ge=0)


class SftConfig(TextBatchedConfig):
    """A model and conversations in, a model that answers out."""

    recipe: Literal["sft"]
    model: StartModelConfig
    data: ConversationDataConfig = ConversationDataConfig()
    number_token_loss: NumberTokenLossConfig | None = Field(
        default=None, description="adds the distance between numbers (weight, distance, multi_digit); null: no"
    )
    teacher: TeacherConfig | None = Field(
        default=None, description="a model to learn from (load, weight, beta, temperature, dtype); null: none"
    )
    eval_steps: NonNegativeInt = Field(default=50, description="steps between evaluations; 0: only at the end")
    samples: AnswerSamplesConfig = AnswerSamplesConfig()


class PreferenceDataConfig(ConversationDataConfig):
    """Preferences: a question, the better answer and the worse one."""

    label_flip_fraction: float = Field(
        default=0.0, ge=0, lt=0.5, description="turn round this part of the training pairs, to see what noise does"
    )


class PairBatchedConfig(BatchedConfig):
    """Preference pairs in rows."""

    batch_size: PositiveInt = Field(default=16, description="pairs in an optimiser step, over all processes")
    sequence_length: int = Field(default=256, ge=4, description="tokens of a prompt with an answer, at most")


class RewardConfig(PairBatchedConfig):
    """A model and preferences in, a model that gives an answer one number out."""

    recipe: Literal["reward"]
    model: StartModelConfig
    data: PreferenceDataConfig = PreferenceDataConfig()
    center_rewards_coefficient: float = Field(default=0.01, ge=0, description="weight of (r_chosen + r_rejected)^2")
    eval_steps: NonNegativeInt = Field(default=50, description="steps between evaluations; 0: only at the end")


class LabelledTextConfig(StrictModel):
    """Texts with labels."""

    source: str = Field(
        default="builtin", min_length=1, description="builtin, or a .csv, .tsv, .json or .jsonl file of rows"
    )
    text_column: str = Field(default="text", min_length=1, description="the column that holds the text")
    label_column: str = Field(default="label", min_length=1, description="the column that holds its label")
    held_out: float = Field(default=0.1, gt=0, lt=0.5, description="the part of the texts that is never trained on")
    max_samples: PositiveInt | None = Field(default=None, description="use so many rows; null: all")


class ClassifyConfig(BatchedConfig):
    """A model and labelled texts in, a classifier out."""

    recipe: Literal["classify"]
    model: StartModelConfig
    data: LabelledTextConfig = LabelledTextConfig()
    sequence_length: int = Field(default=128, ge=1, description="tokens of a text that are read, at most")
    trainable: Literal["all", "last_block", "head"] = Field(
        default="all", description="what learns: everything, the last block with the last norm and the head, the head"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing")
    eval_steps: NonNegativeInt = Field(default=50, description="steps between evaluations; 0: only at the end")

    @model_validator(mode="after")
    def check_trainable(self) -> ClassifyConfig:
        if self.techniques and self.trainable != "all":
            raise ValueError(
                f"techniques decide what is trained, so trainable={self.trainable} has no effect; leave one out"
            )
        return self


class DpoConfig(PairBatchedConfig):
    """A model that answers and preferences in, a model that prefers out."""

    recipe: Literal["dpo"]
    model: StartModelConfig
    data: PreferenceDataConfig = PreferenceDataConfig()
    loss_type: Annotated[str, Choice(PREFERENCE_LOSSES)] = "dpo"
    beta: PositiveFloat = Field(default=0.1, description="how strongly the policy is held to the reference")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="cdpo and robust: the fraction of wrong labels"
    )
    loss_kwargs: dict[str, float] = Field(default_factory=dict, description="further numbers of the loss")
    average_log_prob: bool = Field(
        default=False, description="means over tokens in place of sums, as TRL has it for ipo"
    )
    precompute_ref_log_probs: bool = Field(
        default=True, description="before the first step; false: at every step, with the adapters off"
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
        if loss.needs_reference:
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
        return make_preference_loss(self.loss_type, beta=self.beta, **smoothing, **self.loss_kwargs)

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
