"""The settings of a pretraining run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from llm_quest.recipes.auxiliary_losses import AuxiliaryLosses
from llm_quest.recipes.config_schema import (
    ModelConfig,
    NonNegativeInt,
    PositiveInt,
    SamplesConfig,
    TextBatchedConfig,
    TextDataConfig,
    TokenizerConfig,
)
from llm_quest.recipes.distillation import TeacherConfig
from llm_quest.recipes.number_token_loss import NumberTokenLossConfig


class PretrainConfig(TextBatchedConfig):
    """Text in, a language model out."""

    recipe: Literal["pretrain"]
    data: TextDataConfig = Field(default_factory=TextDataConfig)
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig
    router_aux_loss_coef: float | None = Field(
        default=None, ge=0, description="load-balancing loss of experts (Switch); null: the model's own"
    )
    router_seq_aux_loss_coef: float | None = Field(
        default=None, ge=0, description="DeepSeek-V3's balance loss within each sequence; null: the model's own"
    )
    router_z_loss_coef: float = Field(
        default=0.0, ge=0, description="ST-MoE's loss that keeps router logits small; 0.001 is usual"
    )
    expert_bias_update_speed: float | None = Field(
        default=None, ge=0, le=1, description="step of the bias that balances experts; null: 0.001 if there is one"
    )
    mtp_loss_weight: float | None = Field(
        default=None, gt=0, description="weight of the multi-token modules' loss; null: 0.3 if there are any"
    )
    number_token_loss: NumberTokenLossConfig | None = Field(
        default=None, description="adds the distance between numbers (weight, distance, multi_digit); null: no"
    )
    teacher: TeacherConfig | None = Field(
        default=None, description="a model to learn from (load, weight, beta, temperature, dtype); null: none"
    )
    eval_steps: NonNegativeInt = Field(default=200, description="steps between evaluations; 0: only at the end")
    eval_tokens: PositiveInt = Field(
        default=50_000, description="held-out tokens of each evaluation; the last one reads all of them"
    )
    eval_baselines: bool = Field(
        default=True, description="at the end, what n-gram models and compressors reach on the same bytes"
    )
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
        """Coefficients of the losses besides the next token's."""
        return AuxiliaryLosses(
            self.router_aux_loss_coef,
            self.router_seq_aux_loss_coef,
            self.router_z_loss_coef,
            self.expert_bias_update_speed,
            self.mtp_loss_weight,
        )
