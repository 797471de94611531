"""Schemas of the keys that recipes share: the type, the meaning and the default of each. A default is a
recommendation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from llm_quest.data.corpus import builtin_parts
from llm_quest.data.row_forms import TEXT_FORMS
from llm_quest.machine.probe import DTYPES
from llm_quest.recipes.row_source import RowsConfig, Sources
from llm_quest.recipes.schema import Choice, LocalPath, StrictModel
from llm_quest.recipes.technique_entry import TechniqueEntry
from llm_quest.techniques import ACT_IN_TRAINING_MODE
from llm_quest.train.optimizers import OPTIMIZERS, SCHEDULE_SHAPES
from llm_quest.train.trackers import TRACKERS

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
UnitFraction = Annotated[float, Field(ge=0, le=1)]
FewRowProducts = dict[Annotated[str, Choice(DTYPES)], tuple[PositiveInt, PositiveInt]]


class TextDataConfig(RowsConfig):
    """The text to train on, and the part of it that is held out (whole documents, chosen by their content)."""

    forms = TEXT_FORMS
    source: Sources = Field(
        default="builtin",
        description="builtin, builtin:topics,docstrings,source, a text file, a file of rows, a folder, hf:DATASET, "
        "FILE.py:FUNCTION, or a list of them with weights",
    )
    separator: str | None = Field(default=None, min_length=1, description="splits a text file into documents")
    held_out: float = Field(
        default=0.05, ge=0, lt=0.5, description="the part of the documents that is never trained on; 0: none"
    )

    @field_validator("source")
    @classmethod
    def check_builtin_parts(cls, source: Any) -> Any:
        for path in [source] if isinstance(source, str) else [one.path for one in source]:
            if path.partition(":")[0] == "builtin":
                builtin_parts(path)
        return source


class TokenizerConfig(StrictModel):
    """A byte-level BPE trained on the training text, or one that exists."""

    vocab_size: int = Field(default=4096, ge=300, le=1_000_000, description="how many tokens to train")
    load: LocalPath | None = Field(default=None, description="a folder or tokenizer.json in place of training one")


class ModelConfig(StrictModel):
    """Exactly one of: preset (a published model), family with config (your own), load (the weights to start from)."""

    preset: str | None = Field(default=None, description="a name from `quest models`")
    family: str | None = Field(default=None, description="a model family: llama, gpt2; without config its -tiny size")
    config: dict[str, Any] = Field(
        default_factory=dict, description="config.json's fields of the family; with a preset, those to change"
    )
    load: LocalPath | None = Field(default=None, description="a Hugging Face folder, hub id or run folder")

    @model_validator(mode="after")
    def require_one_source(self) -> ModelConfig:
        given = [name for name in ("preset", "family", "load") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of preset, family, load ({' and '.join(given) or 'none'} given; null takes one away)"
            )
        if self.config and self.load is not None:
            raise ValueError(
                "a loaded model has its own config; remove model.config, or build a model with model.family"
            )
        return self


class SamplesConfig(StrictModel):
    """Texts the model writes during the run."""

    every_steps: NonNegativeInt = Field(default=200, description="steps; 0: none")
    prompts: tuple[str, ...] = Field(
        default=("The ", "Return "), max_length=16, description="what each text goes on from"
    )
    max_new_tokens: PositiveInt = Field(default=64, description="tokens of each text")
    temperature: float = Field(default=0.8, ge=0, description="of the texts; 0: greedy")


KEYS_FREE_ON_RESUME = (
    "device",
    "threads",
    "compile",
    "parallel",
    "save_steps",
    "save_minutes",
    "save_total_limit",
    "keep_every",
    "metric_for_best_model",
    "greater_is_better",
    "early_stopping_patience",
    "load_best_model_at_end",
    "on_disk_full",
    "async_save",
    "max_nonfinite_steps",
    "max_empty_steps",
    "report_to",
    "tensorboard",
    "max_time",
    "logging_steps",
    "samples",
    "eval_steps",
    "eval_tokens",
    "eval_baselines",
    "eval_problems",
    "eval_num_samples",
    "eval_images",
    "eval_positions_per_bucket",
    "num_outer_iterations",
)
"""Keys that may differ when a run is resumed: they say how it is run and evaluated, and change no more than the last
bits of what it computes."""


class RunConfig(StrictModel):
    """Keys of every recipe: steps, optimizer, precision, checkpoints, logging. Each recipe's config is one of these."""

    recipe: str = Field(description="what is trained: one of the recipes")
    seed: NonNegativeInt = Field(
        default=0, description="decides initial weights, data order, dropout and samples, each by a stream of its own"
    )
    max_steps: PositiveInt = Field(
        default=1000, description="optimizer steps of the whole run; more of them make a finished run longer"
    )
    optim: Annotated[str, Choice(OPTIMIZERS)] = Field(
        default="adamw", description="muon updates the hidden matrices and AdamW the rest, at one learning rate"
    )
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="peak learning rate")
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="decay of the averages of gradients and of their squares"
    )
    adam_epsilon: PositiveFloat = Field(default=1e-8, description="added to the root of the average of squares")
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="decay of Muon's average of gradients")
    muon_form: Literal["auto", "float32", "bfloat16", "eigenvalues", "gram", "kernel_float32", "kernel_bfloat16"] = (
        Field(
            default="auto",
            description="Muon's iterations: products in a dtype, eigenvalues, products of X X^T, or a kernel in C++; "
            "auto: the fastest here",
        )
    )
    weight_decay: float = Field(default=0.1, ge=0, description="of matrices only")
    lr_scheduler_type: Annotated[str, Choice(SCHEDULE_SHAPES)] = Field(
        default="cosine", description="how the learning rate falls after the warm-up"
    )
    warmup_steps: NonNegativeInt = Field(default=20, description="steps of linear warm-up")
    min_lr_ratio: UnitFraction = Field(default=0.1, description="the last learning rate as a fraction of the peak")
    lr_decay_ratio: float = Field(
        default=0.2, gt=0, le=1, description="wsd: the last fraction of the run, in which the rate decays"
    )
    techniques: tuple[TechniqueEntry, ...] = Field(
        default=(), description="edits of the model, in order: names, or {name: lora, rank: 8}"
    )
    freeze: tuple[str, ...] = Field(
        default=(),
        description="parameters that are not trained, by name: [model.embed_tokens.*, blocks.0.*]; * is any text",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute each block again in the backward pass instead of keeping its activations"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="largest gradient norm; null: any"
    )
    precision: Literal["auto", "fp32", "bf16", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bf16 where training in it is measured to be faster"
    )
    compile: bool | Literal["auto"] = Field(
        default="auto", description="auto: where the run is long enough to repay it"
    )
    few_row_products: Literal["auto"] | FewRowProducts = Field(
        default="auto",
        description="rows for which products are taken in the other order: {dtype: [first, first that is too many]}; "
        "auto: where that is measured to be faster",
    )
    few_row_kernel: Literal["auto"] | FewRowProducts = Field(
        default="auto",
        description="the same for products by the loop in C++; auto: where `quest doctor` has measured it to be faster",
    )
    training_kernels: bool | Literal["auto"] = Field(
        default="auto",
        description="layers of a training step in float32 on the CPU by operators in C++; auto: where the run is long "
        "enough to repay building them",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="how processes started by torchrun share the work"
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:1, mps"
    )
    threads: NonNegativeInt = Field(
        default=0, description="CPU threads; 0: one for each core that other programs leave idle, or OMP_NUM_THREADS"
    )
    save_steps: NonNegativeInt = Field(
        default=500,
        description="steps between checkpoints; 0: by time and at the end; an interrupted run saves too",
    )
    save_minutes: float = Field(
        default=5.0, ge=0, description="a checkpoint is saved this long after the last one too; 0: by steps alone"
    )
    save_total_limit: PositiveInt = Field(default=2, description="how many of the newest checkpoints are kept")
    keep_every: NonNegativeInt = Field(default=0, description="checkpoints at multiples of this step are kept too")
    metric_for_best_model: str | None = Field(
        default=None,
        description="a metric of the run, such as eval/loss: the model of its best value is saved and kept (RUN@best)",
    )
    greater_is_better: bool | None = Field(
        default=None, description="of metric_for_best_model; null: false for losses, perplexities, bits and errors"
    )
    early_stopping_patience: PositiveInt | None = Field(
        default=None, description="measurements of metric_for_best_model without a better value that end the run"
    )
    load_best_model_at_end: bool = Field(
        default=False, description="the run's model is at its end the best one by metric_for_best_model"
    )
    on_disk_full: Literal["stop", "continue"] = Field(
        default="stop", description="continue: the run goes on without the checkpoint"
    )
    async_save: bool = Field(default=True, description="write checkpoints in the background, from a copy in memory")
    max_nonfinite_steps: NonNegativeInt = Field(
        default=10, description="more steps in a row with a loss or gradient that is not finite stop the run"
    )
    max_empty_steps: NonNegativeInt = Field(
        default=100, description="more steps in a row without a target stop the run"
    )
    logging_steps: PositiveInt = Field(default=10, description="steps")
    max_time: str | None = Field(
        default=None, pattern=r"^\d+(\.\d+)?[smh]$", description="like 90s, 30m or 2h: then it saves and ends"
    )
    report_to: tuple[Annotated[str, Choice(TRACKERS)], ...] = Field(
        default=(), description="trackers that get the numbers too: [tensorboard, wandb, trackio]"
    )
    tensorboard: bool = Field(default=False, description="the same as report_to=[tensorboard]")

    @model_validator(mode="after")
    def check_warmup_steps(self) -> RunConfig:
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is more than max_steps {self.max_steps}; lower it")
        return self

    @property
    def all_techniques(self) -> tuple[TechniqueEntry, ...]:
        """The techniques in the order in which they are applied; `gradient_checkpointing` is one and the last."""
        return (*self.techniques, {"name": "checkpointing"}) if self.gradient_checkpointing else self.techniques

    @property
    def scores_without_dropout(self) -> bool:
        """Whether the objective's passes are in evaluation mode."""
        return False

    @model_validator(mode="after")
    def check_training_mode(self) -> RunConfig:
        named = [technique["name"] for technique in self.all_techniques if technique["name"] in ACT_IN_TRAINING_MODE]
        if self.scores_without_dropout and named:
            raise ValueError(
                f"techniques: {named[0]} has no effect on this recipe, whose passes are without dropout and noise, in "
                "evaluation mode; leave it out"
            )
        return self

    @model_validator(mode="after")
    def check_best_metric(self) -> RunConfig:
        for key in ("greater_is_better", "early_stopping_patience", "load_best_model_at_end"):
            if self.metric_for_best_model is None and getattr(self, key) not in (None, False):
                raise ValueError(f"{key} has no effect without metric_for_best_model; name a metric, such as eval/loss")
        if self.load_best_model_at_end and self.parallel == "fsdp":
            raise ValueError("load_best_model_at_end needs the whole model on each process: set parallel=ddp")
        return self

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers of `report_to` and `tensorboard`, each once."""
        return tuple(dict.fromkeys((*self.report_to, *(("tensorboard",) if self.tensorboard else ()))))

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step over all processes, which share them equally."""
        return 1

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps that learn from the same rows."""
        return 1

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        return (
            None
            if self.max_time is None
            else float(self.max_time[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.max_time[-1]]
        )


class BatchedConfig(RunConfig):
    """The batch of one optimizer step, over all processes; micro-batches change memory, not the result."""

    num_train_epochs: PositiveFloat | None = Field(
        default=None, description="passes over the data, in place of max_steps, which then follows from its rows"
    )
    batch_size: PositiveInt = Field(default=32, description="rows in an optimizer step, over all processes")
    micro_batch_size: PositiveInt | None = Field(
        default=None, description="rows at once on each process; null: as many as fit 8,192 tokens"
    )

    @property
    def rows_per_step(self) -> int:
        return self.batch_size

    @model_validator(mode="after")
    def check_micro_batch_size(self) -> BatchedConfig:
        size, whole = self.micro_batch_size, self.batch_size
        if size is not None and whole % size:
            near = max(n for n in range(1, min(whole, size) + 1) if whole % n == 0)
            raise ValueError(f"micro_batch_size {size} must divide batch_size {whole}; the nearest below is {near}")
        return self


class TextBatchedConfig(BatchedConfig):
    """Rows of text."""

    sequence_length: int = Field(default=256, ge=2, description="tokens in a row")
