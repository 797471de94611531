"""The parts recipes are made of, as typed settings: what each key takes and what it is for. A default is a
recommendation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from llm_quest.data.corpus import builtin_parts
from llm_quest.recipes.choice import Choice
from llm_quest.recipes.config import StrictModel
from llm_quest.recipes.techniques import TechniqueEntry
from llm_quest.train.lr_schedule import SCHEDULE_SHAPES

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
UnitFraction = Annotated[float, Field(ge=0, le=1)]


class TextDataConfig(StrictModel):
    """Where the text comes from, and how much of it is held out (whole documents, chosen by their content)."""

    source: str = Field(
        default="builtin",
        min_length=1,
        description="builtin, builtin:topics,docstrings,source, a text or JSONL file, a folder",
    )
    column: str = Field(default="text", min_length=1, description="the key of a JSONL line that holds its text")
    separator: str | None = Field(default=None, min_length=1, description="splits a text file into documents")
    held_out: float = Field(
        default=0.05, gt=0, lt=0.5, description="the part of the documents that is never trained on"
    )

    @field_validator("source")
    @classmethod
    def known_parts(cls, source: str) -> str:
        if source.partition(":")[0] == "builtin":
            builtin_parts(source)
        return source


class TokenizerConfig(StrictModel):
    """A byte-level BPE trained on the training text, or one that exists."""

    vocab: int = Field(default=4096, ge=300, le=1_000_000, description="how many tokens to train")
    load: str | None = Field(default=None, description="a folder or tokenizer.json to use instead of training one")


class ModelConfig(StrictModel):
    """Exactly one of: preset (a published size), page with sizes (your own), load (a folder or run whose weights to go
    on from)."""

    preset: str | None = Field(default=None, description="a name from `quest models`")
    page: str | None = Field(default=None, description="a family: llama, gpt2")
    sizes: dict[str, Any] = Field(
        default_factory=dict, description="the page's numbers; with a preset, those to change"
    )
    load: str | None = Field(default=None, description="a Hugging Face folder, hub id or run folder")

    @model_validator(mode="after")
    def require_one_source(self) -> ModelConfig:
        given = [name for name in ("preset", "page", "load") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of preset, page, load ({' and '.join(given) or 'none'} given; null takes one away)"
            )
        if self.sizes and self.load is not None:
            raise ValueError("a loaded model has its own sizes; remove sizes, or build one with page")
        return self


class BatchConfig(StrictModel):
    """The rows of one optimiser step, over all processes; the split into micro-batches changes memory, not the
    result."""

    rows: PositiveInt = Field(default=32, description="rows in a step")
    micro_rows: PositiveInt | None = Field(
        default=None, description="rows at once on each process; null: as many as fit 8,192 tokens"
    )
    length: int = Field(default=256, ge=2, description="tokens in a row")

    @model_validator(mode="after")
    def check_micro_batch_size(self) -> BatchConfig:
        if self.micro_rows is not None and self.rows % self.micro_rows:
            near = max(n for n in range(1, min(self.rows, self.micro_rows) + 1) if self.rows % n == 0)
            raise ValueError(f"micro_rows {self.micro_rows} must divide rows {self.rows}; the nearest below is {near}")
        return self


class OptimizerConfig(StrictModel):
    """lr is the peak rate. Muon turns the hidden matrices and AdamW the rest, at one rate for both."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=1e-3, gt=0, le=1, description="peak learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon's")
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(default=0.1, ge=0, description="of matrices only")


class SchedulerConfig(StrictModel):
    """The rate over the run: a linear warm-up, then a shape down to floor x lr."""

    shape: Annotated[str, Choice(SCHEDULE_SHAPES)] = "cosine"
    warmup: NonNegativeInt = Field(default=20, description="steps")
    floor: UnitFraction = Field(default=0.1, description="what is left of the rate at the end")
    decay_fraction: float = Field(
        default=0.2, gt=0, le=1, description="wsd: the last part of the run, in which the rate falls"
    )


class EvalConfig(StrictModel):
    """Held-out loss during the run."""

    every: NonNegativeInt = Field(default=200, description="steps; 0: only at the end")
    tokens: PositiveInt = Field(
        default=50_000, description="held-out tokens looked at each time; at the end all of them"
    )
    baselines: bool = Field(
        default=True, description="at the end, what counting and compressing reach on the same bytes"
    )


class SamplesConfig(StrictModel):
    """Texts the model writes during the run."""

    every: NonNegativeInt = Field(default=200, description="steps; 0: none")
    prompts: tuple[str, ...] = Field(default=("The ", "Return "), max_length=16)
    tokens: PositiveInt = Field(default=64, description="how many to write")
    temperature: float = Field(default=0.8, ge=0)


class CheckpointConfig(StrictModel):
    """When the run is saved, and how many checkpoints are kept. It is always saved at its end and when it is
    interrupted."""

    every: NonNegativeInt = Field(default=500, description="steps; 0: only at the end")
    keep: PositiveInt = Field(default=2, description="how many of the newest stay")


KEYS_FREE_ON_RESUME = (
    "device",
    "threads",
    "parallel",
    "checkpoint",
    "tensorboard",
    "max_time",
    "log_every",
    "evaluate",
    "samples",
)
"""What may differ when a run is resumed: how it is run and watched, not what it computes."""


class RunConfig(StrictModel):
    """How a run goes on, whatever it learns. Each recipe's config is one of these."""

    recipe: str
    seed: NonNegativeInt = Field(
        default=0, description="decides first values, data order, dropout and samples, each by a stream of its own"
    )
    steps: PositiveInt = Field(default=1000, description="optimiser steps of the whole run")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: SchedulerConfig = SchedulerConfig()
    techniques: tuple[TechniqueEntry, ...] = Field(
        default=(), description="edits of the model, in order: names, or {name: lora, rank: 8}"
    )
    clip: Annotated[float, Field(gt=0)] | None = Field(default=1.0, description="largest gradient norm; null: any")
    precision: Literal["auto", "fp32", "bf16", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bf16 where the hardware has it"
    )
    compile: bool | Literal["auto"] = Field(
        default="auto", description="auto: where the run is long enough to repay it"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="how processes started by torchrun share the work"
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:1, mps"
    )
    threads: NonNegativeInt = Field(
        default=0, description="CPU threads; 0: as many as there are cores, or OMP_NUM_THREADS"
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every: PositiveInt = Field(default=10, description="steps")
    max_time: str | None = Field(
        default=None, pattern=r"^\d+(\.\d+)?[smh]$", description="like 90s, 30m or 2h: then it saves and ends"
    )
    tensorboard: bool = False

    @model_validator(mode="after")
    def check_warmup_steps(self) -> RunConfig:
        if self.schedule.warmup > self.steps:
            raise ValueError(
                f"schedule.warmup {self.schedule.warmup} is longer than the run of {self.steps} steps; shorten it"
            )
        return self

    @property
    def max_seconds(self) -> float | None:
        """`max_seconds` in seconds."""
        return (
            None
            if self.max_time is None
            else float(self.max_time[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.max_time[-1]]
        )
