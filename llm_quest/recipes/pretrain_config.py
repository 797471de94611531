"""The settings of a pretraining run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from llm_quest.recipes.auxiliary_losses import AuxiliaryLosses, RouterLossConfig
from llm_quest.recipes.config_schema import (
    BatchConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    SamplesConfig,
    TextDataConfig,
    TokenizerConfig,
)
from llm_quest.recipes.distillation import TeacherConfig
from llm_quest.recipes.number_token_loss import NumberTokenLossConfig


class PretrainConfig(RunConfig):
    """Text in, a language model out."""

    recipe: Literal["pretrain"]
    data: TextDataConfig = Field(default_factory=TextDataConfig)
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig
    batch: BatchConfig = Field(default_factory=BatchConfig)
    activation_checkpointing: bool = Field(
        default=False, description="compute each block twice instead of remembering it"
    )
    router: RouterLossConfig | None = Field(
        default=None, description="losses of a mixture of experts; null: what the model's routers are trained with"
    )
    balance: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="step of the bias that evens the experts' load; null: 0.001 if there is one",
    )
    lookahead: float | None = Field(
        default=None, gt=0, description="weight of the multi-token modules' loss; null: 0.3 if there are any"
    )
    number_token: NumberTokenLossConfig | None = Field(
        default=None, description="how far off a number is counts too (weight, distance, multi_digit); null: no"
    )
    teacher: TeacherConfig | None = Field(
        default=None, description="a model to learn from (load, weight, beta, temperature, dtype); null: none"
    )
    evaluate: EvalConfig = EvalConfig()
    samples: SamplesConfig = SamplesConfig()

    @model_validator(mode="before")
    @classmethod
    def tokenizer_of_the_model(cls, given: Any) -> Any:
        """A model that is loaded brings its tokenizer."""
        model = given.get("model") if isinstance(given, dict) else None
        if isinstance(model, dict) and model.get("load") and "tokenizer" not in given:
            return {**given, "tokenizer": {"load": model["load"]}}
        return given

    @property
    def auxiliary_losses(self) -> AuxiliaryLosses:
        """What is trained beside the next token."""
        return AuxiliaryLosses(self.router, self.balance, self.lookahead)
