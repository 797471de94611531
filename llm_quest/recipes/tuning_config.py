"""The settings of the recipes that go on from a model: `sft`, `reward`, `dpo`, `classify`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llm_quest.objectives.preference import PREFERENCE_LOSSES
from llm_quest.objectives.preference import check_preference_options as require_preference_loss
from llm_quest.recipes.choice import Choice
from llm_quest.recipes.config import StrictModel
from llm_quest.recipes.config_schema import BatchConfig, NonNegativeInt, PositiveFloat, PositiveInt, RunConfig
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
    limit: PositiveInt | None = Field(default=None, description="use so many rows; null: all")
    template: str | None = Field(
        default=None, min_length=1, description="a file with a chat template, in place of the model's own"
    )


class EvalIntervalConfig(StrictModel):
    """Held-out measures during the run."""

    every: NonNegativeInt = Field(default=50, description="steps; 0: only at the end")


class AnswerSamplesConfig(StrictModel):
    """Held-out questions that the model answers during the run."""

    every: NonNegativeInt = Field(default=100, description="steps; 0: none")
    number: PositiveInt = Field(default=4, description="how many questions")
    tokens: PositiveInt = Field(default=64, description="how long an answer may be")
    temperature: float = Field(default=0.0, ge=0)


class SftConfig(RunConfig):
    """A model and conversations in, a model that answers out."""

    recipe: Literal["sft"]
    model: StartModelConfig
    data: ConversationDataConfig = ConversationDataConfig()
    batch: BatchConfig = Field(default_factory=BatchConfig)
    number_token: NumberTokenLossConfig | None = Field(
        default=None, description="how far off a number is counts too (weight, distance, multi_digit); null: no"
    )
    teacher: TeacherConfig | None = Field(
        default=None, description="a model to learn from (load, weight, beta, temperature, dtype); null: none"
    )
    evaluate: EvalIntervalConfig = EvalIntervalConfig()
    samples: AnswerSamplesConfig = AnswerSamplesConfig()


class PreferenceDataConfig(ConversationDataConfig):
    """Preferences: a question, the better answer and the worse one."""

    flipped: float = Field(
        default=0.0, ge=0, lt=0.5, description="turn round this part of the training pairs, to see what noise does"
    )


class PairBatchConfig(StrictModel):
    """The pairs of one optimiser step, over all processes."""

    rows: PositiveInt = Field(default=16, description="pairs in a step")
    micro_rows: PositiveInt | None = Field(
        default=None, description="pairs at once on each process; null: as many as fit 8,192 tokens"
    )
    length: int = Field(default=256, ge=4, description="tokens of a question with an answer, at most")

    @model_validator(mode="after")
    def check_micro_batch_size(self) -> PairBatchConfig:
        if self.micro_rows is not None and self.rows % self.micro_rows:
            raise ValueError(f"micro_rows {self.micro_rows} must divide rows {self.rows}")
        return self


class RewardConfig(RunConfig):
    """A model and preferences in, a model that gives an answer one number out."""

    recipe: Literal["reward"]
    model: StartModelConfig
    data: PreferenceDataConfig = PreferenceDataConfig()
    batch: PairBatchConfig = PairBatchConfig()
    center: float = Field(default=0.01, ge=0, description="weight of (r_chosen + r_rejected)^2")
    evaluate: EvalIntervalConfig = EvalIntervalConfig()


class LabelledTextConfig(StrictModel):
    """Texts with labels."""

    source: str = Field(
        default="builtin", min_length=1, description="builtin, or a .csv, .tsv, .json or .jsonl file of rows"
    )
    text: str = Field(default="text", min_length=1, description="the column that holds the text")
    label: str = Field(default="label", min_length=1, description="the column that holds its label")
    held_out: float = Field(default=0.1, gt=0, lt=0.5, description="the part of the texts that is never trained on")
    limit: PositiveInt | None = Field(default=None, description="use so many rows; null: all")


class TextBatchConfig(PairBatchConfig):
    """The texts of one optimiser step, over all processes."""

    rows: PositiveInt = Field(default=32, description="texts in a step")
    length: int = Field(default=128, ge=1, description="tokens of a text that are read, at most")


class ClassifyConfig(RunConfig):
    """A model and labelled texts in, a classifier out."""

    recipe: Literal["classify"]
    model: StartModelConfig
    data: LabelledTextConfig = LabelledTextConfig()
    batch: TextBatchConfig = TextBatchConfig()
    train: Literal["all", "last_block", "head"] = Field(
        default="all", description="what learns: everything, the last block with the last norm and the head, the head"
    )
    smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing")
    evaluate: EvalIntervalConfig = EvalIntervalConfig()

    @model_validator(mode="after")
    def check_trainable(self) -> ClassifyConfig:
        if self.techniques and self.train != "all":
            raise ValueError(f"techniques say what learns, so train: {self.train} would have no effect; take one away")
        return self


class ReferenceSyncConfig(StrictModel):
    """TR-DPO: the reference follows the policy."""

    every: PositiveInt = Field(default=512, description="steps")
    mix: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.6, description="of the policy; the rest stays the reference"
    )


class DpoConfig(RunConfig):
    """A model that answers and preferences in, a model that prefers out."""

    recipe: Literal["dpo"]
    model: StartModelConfig
    data: PreferenceDataConfig = PreferenceDataConfig()
    batch: PairBatchConfig = PairBatchConfig()
    loss: Annotated[str, Choice(PREFERENCE_LOSSES)] = "dpo"
    beta: PositiveFloat = Field(default=0.1, description="how strongly the policy is held to the reference")
    flips: float = Field(default=0.0, ge=0, lt=0.5, description="cdpo and robust: the part of wrong labels")
    per_token: bool = Field(default=False, description="means over tokens in place of sums, as TRL has it for ipo")
    reference: Literal["cached", "adapters_off"] = Field(
        default="cached", description="computed once and kept, or at every step with the adapters off"
    )
    sync: ReferenceSyncConfig | None = Field(default=None, description="null: the reference stays")
    evaluate: EvalIntervalConfig = EvalIntervalConfig()

    @model_validator(mode="after")
    def flips_of_the_loss(self) -> DpoConfig:
        require_preference_loss(self.loss, self.beta, self.flips)
        return self

    @model_validator(mode="after")
    def check_single_reference(self) -> DpoConfig:
        if self.sync is not None and self.parallel == "fsdp":
            raise ValueError(
                "sync keeps a whole copy of the model on each process: set parallel=ddp, or leave sync out"
            )
        if self.sync is not None and self.reference != "cached":
            raise ValueError("sync makes a reference of its own, so reference: adapters_off would have no effect")
        return self
