"""The settings of a pretraining run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llm_quest.recipes.config import Strict
from llm_quest.recipes.parts import (
    Batch,
    Checkpoint,
    Count,
    Data,
    Evaluate,
    Few,
    Model,
    Optimizer,
    Samples,
    Schedule,
    TokenizerPart,
)

FREE = ("device", "threads", "parallel", "checkpoint", "tensorboard", "max_time", "log_every", "evaluate", "samples")
"""What may differ when a run is resumed: how it is run and watched, not what it computes."""


class Pretrain(Strict):
    """Text in, a language model out."""

    recipe: Literal["pretrain"]
    seed: Few = Field(
        default=0, description="decides first values, data order, dropout and samples, each by a stream of its own"
    )
    data: Data = Field(default_factory=Data)
    tokenizer: TokenizerPart = TokenizerPart()
    model: Model
    batch: Batch = Field(default_factory=Batch)
    steps: Count = Field(default=1000, description="optimiser steps of the whole run")
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip: Annotated[float, Field(gt=0)] | None = Field(default=1.0, description="largest gradient norm; null: any")
    precision: Literal["auto", "fp32", "bf16", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bf16 where the hardware has it"
    )
    compile: bool | Literal["auto"] = Field(
        default="auto", description="auto: where the run is long enough to repay it"
    )
    activation_checkpointing: bool = Field(
        default=False, description="compute each block twice instead of remembering it"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="how processes started by torchrun share the work"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps")
    threads: Few = Field(default=0, description="CPU threads; 0: as many as there are cores, or OMP_NUM_THREADS")
    evaluate: Evaluate = Evaluate()
    samples: Samples = Samples()
    checkpoint: Checkpoint = Checkpoint()
    log_every: Count = Field(default=10, description="steps")
    max_time: str | None = Field(
        default=None, pattern=r"^\d+(\.\d+)?[smh]$", description="like 90s, 30m or 2h: then it saves and ends"
    )
    tensorboard: bool = False

    @model_validator(mode="after")
    def warmup_fits(self) -> Pretrain:
        if self.schedule.warmup > self.steps:
            raise ValueError(
                f"schedule.warmup {self.schedule.warmup} is longer than the run of {self.steps} steps; shorten it"
            )
        return self

    @property
    def seconds(self) -> float | None:
        """`max_time` in seconds."""
        return (
            None
            if self.max_time is None
            else float(self.max_time[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.max_time[-1]]
        )


PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
