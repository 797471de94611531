"""The settings of the recipes that go on from a model: what they have in common, and `sft`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llm_quest.recipes.config import Strict
from llm_quest.recipes.parts import Batch, Count, Course, Few


class Start(Strict):
    """The model to go on from; its tokenizer and chat template come with it."""

    load: str = Field(min_length=1, description="a run folder, a Hugging Face folder or a hub id")


class Said(Strict):
    """Conversations, and how they are laid out."""

    source: str = Field(
        default="builtin", min_length=1, description="builtin, or a .json, .jsonl, .csv or .tsv file of rows"
    )
    held_out: float = Field(default=0.1, gt=0, lt=0.5, description="the part of the questions that is never trained on")
    limit: Count | None = Field(default=None, description="use so many rows; null: all")
    template: str | None = Field(
        default=None, min_length=1, description="a file with a chat template, in place of the model's own"
    )


class Looking(Strict):
    """Held-out measures during the run."""

    every: Few = Field(default=50, description="steps; 0: only at the end")


class Questions(Strict):
    """Held-out questions that the model answers during the run."""

    every: Few = Field(default=100, description="steps; 0: none")
    number: Count = Field(default=4, description="how many questions")
    tokens: Count = Field(default=64, description="how long an answer may be")
    temperature: float = Field(default=0.0, ge=0)


class Sft(Course):
    """A model and conversations in, a model that answers out."""

    recipe: Literal["sft"]
    model: Start
    data: Said = Said()
    batch: Batch = Field(default_factory=Batch)
    evaluate: Looking = Looking()
    samples: Questions = Questions()
