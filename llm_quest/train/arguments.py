"""TrainingArguments, and the result of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_quest.errors import UsageError

PRECISIONS = ("fp32", "bf16")
ON_DISK_FULL = ("stop", "continue")


@dataclass(frozen=True)
class TrainingArguments:
    """Arguments of the training loop, named as in transformers where it has them.

    max_steps: optimizer steps of the whole run. max_grad_norm: None does not clip. logging_steps: steps per row of
    metrics. save_steps: steps per checkpoint; 0 saves at the end only. save_seconds: a checkpoint is also saved by the
    first step that ends so many seconds after the last one; 0: none. save_total_limit: how many of the newest
    checkpoints are kept (0: all); keep_every: those at its multiples are kept too; metric_for_best_model: a metric,
    such as "eval/loss", by which the best checkpoint is saved and kept too (greater_is_better: the largest value is
    best; None: as its name says). early_stopping_patience: measurements of it without a better value that end the run.
    load_best_model_at_end: the model is then the best one. precision: fp32, or bf16 (autocast; the weights stay
    float32). max_nonfinite_steps, max_empty_steps: more of them in a row stop the run. watch_loss: whether a loss that
    rises far means that the run diverges (the loss of a policy gradient does not). max_seconds: the run saves and ends
    after so many seconds. name: what the progress display calls the run. expected_loss: of the first step (ln V); a
    loss more than a fifth away from it gives a warning. on_disk_full: stop, or continue without that checkpoint.
    async_save: write checkpoints in the background, from a copy in memory."""

    max_steps: int
    max_grad_norm: float | None = 1.0
    logging_steps: int = 10
    save_steps: int = 0
    save_seconds: float = 0.0
    save_total_limit: int = 2
    keep_every: int = 0
    metric_for_best_model: str = ""
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = None
    load_best_model_at_end: bool = False
    precision: str = "fp32"
    compile: bool = False
    max_nonfinite_steps: int = 10
    max_empty_steps: int = 100
    watch_loss: bool = True
    max_seconds: float | None = None
    seed: int = 0
    expected_loss: float | None = None
    on_disk_full: str = "stop"
    async_save: bool = True
    name: str = "training"

    def __post_init__(self) -> None:
        for name, allowed in (("precision", PRECISIONS), ("on_disk_full", ON_DISK_FULL)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} is {getattr(self, name)!r}; known: {', '.join(allowed)}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UsageError(
                f"max_grad_norm is {self.max_grad_norm}; expected a positive norm, or None for no clipping"
            )
        if self.logging_steps < 1:
            raise UsageError(f"logging_steps is {self.logging_steps}; expected 1 or more steps")
        counts = "max_steps save_steps save_seconds save_total_limit keep_every max_nonfinite_steps max_empty_steps"
        for name in counts.split():
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; expected 0 or more")


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run. status: finished, interrupted (a signal) or time. exit_code: 0, or 128 + the
    signal's number. metrics: the last row, with the newest values of every evaluation. seconds: wall time of this
    process in the loop; tokens, tokens_per_second: what it trained on, and how fast in its steps alone.
    checkpoint_path: the last checkpoint's folder."""

    step: int
    status: str
    exit_code: int
    metrics: Mapping[str, Any]
    seconds: float
    tokens: int
    tokens_per_second: float
    checkpoint_path: str = ""
