"""What the recipes of images share: their config, and how their models are edited and sharded."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import nn

from llm_quest.recipes.config_schema import BatchedConfig, NonNegativeInt, PositiveInt

EvalFraction = Annotated[float, Field(gt=0, lt=0.9)]


class VisionConfig(BatchedConfig):
    """A run on images."""

    micro_batch_size: PositiveInt | None = Field(default=None, description="images at once on each process; null: all")

    compile: bool = Field(default=False, description="compile the model; repays itself in long runs")
    eval_steps: NonNegativeInt = Field(default=0, description="steps between evaluations; 0: only at the end")


def fsdp_blocks(model: Any) -> list[nn.Module]:
    """What FSDP shards one by one: every block of every part."""
    return [block for name, part in model.named_modules() if name.endswith("blocks") for block in part]
