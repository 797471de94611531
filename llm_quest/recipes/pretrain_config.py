"""The settings of a pretraining run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llm_quest.recipes.parts import Batch, Course, Data, Evaluate, Model, Samples, TokenizerPart


class Pretrain(Course):
    """Text in, a language model out."""

    recipe: Literal["pretrain"]
    data: Data = Field(default_factory=Data)
    tokenizer: TokenizerPart = TokenizerPart()
    model: Model
    batch: Batch = Field(default_factory=Batch)
    activation_checkpointing: bool = Field(
        default=False, description="compute each block twice instead of remembering it"
    )
    evaluate: Evaluate = Evaluate()
    samples: Samples = Samples()
