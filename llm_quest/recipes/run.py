"""How a run goes on, whatever it learns: what all recipes have in common around `train.loop.train`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llm_quest.errors import BusyError, UsageError
from llm_quest.files import atomic_write_json, atomic_write_text
from llm_quest.recipes.config import config_differences, config_to_yaml, load_raw_config, parse_config
from llm_quest.recipes.config_schema import KEYS_FREE_ON_RESUME, RunConfig
from llm_quest.train.arguments import TrainingArguments, TrainResult
from llm_quest.train.checkpoint import list_checkpoints
from llm_quest.train.logger import Logger, TensorBoardLogger, make_logger
from llm_quest.train.lr_schedule import LRSchedule, make_lr_schedule
from llm_quest.train.optimizers import make_adamw, make_muon
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir, json_safe
from llm_quest.train.state_dict import derive_seed


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended, and what it reached. baselines: bits per byte of other methods on the same held-out bytes."""

    run: str
    status: str
    step: int
    steps: int
    exit_code: int
    parameters: int
    seconds: float
    tokens_per_second: float
    metrics: Mapping[str, Any]
    baselines: Mapping[str, float] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, float]:
        """What was measured on held-out data, by name."""
        return {name[5:]: value for name, value in self.metrics.items() if name.startswith("eval/")}

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"metrics": json_safe(self.metrics), "scores": json_safe(self.scores)}

    def lines(self) -> list[str]:
        """For the screen."""
        result = [
            f"{self.status} at step {self.step} of {self.steps}, {self.parameters:,} parameters, "
            f"{self.seconds:.0f} s: {self.run}"
        ]
        if self.scores:
            result.append("held out: " + ", ".join(f"{name} {value:.4g}" for name, value in self.scores.items()))
        if self.baselines:
            result.append(
                "others, bits per byte: " + ", ".join(f"{name} {b:.3f}" for name, b in self.baselines.items())
            )
        if self.status != "finished":
            result.append(f"go on with: quest train {self.run}")
        return result


@contextmanager
def init_distributed(config: RunConfig, batch_size: int) -> Iterator[DistributedContext]:
    """Threads, device and the other processes, for as long as a run takes. batch_size: of one step, over all of
    them."""
    if config.threads:
        torch.set_num_threads(config.threads)
    parallel = DistributedContext.from_environment(config.device, config.parallel)
    try:
        if batch_size % parallel.world_size:
            raise UsageError(
                f"a batch of {batch_size} rows can't be shared by {parallel.world_size} processes; make it a multiple"
            )
        yield parallel
    finally:
        parallel.destroy_process_group()


MICRO_BATCH_TOKENS = 8192
"""Tokens of a micro-batch where micro_batch_size is null."""


def micro_batch_rows(batch_size: int, micro_batch_size: int | None, parallel: DistributedContext, length: int) -> int:
    """Rows of a micro-batch: the given number, else the largest equal part of this process's rows within
    MICRO_BATCH_TOKENS. length: tokens of the longest row."""
    mine = batch_size // parallel.world_size
    if micro_batch_size is not None:
        return min(micro_batch_size, mine)
    most = max(1, min(mine, MICRO_BATCH_TOKENS // length))
    return max(number for number in range(1, most + 1) if mine % number == 0)


def require_run_exists(name_or_path: str, key: str, command: str) -> None:
    """UsageError for a run that is not there, which would be looked for on the hub. key: of the recipe; command: the
    command that trains one."""
    if name_or_path.startswith("runs/") and not Path(name_or_path).is_dir():
        raise UsageError(f"there is no run {name_or_path}: train one first ({command}), or give {key}=FOLDER")


def require_context(length: int, context: int) -> None:
    """Rows no longer than what the model can see."""
    if length > context:
        raise UsageError(
            f"sequence_length {length} is longer than the model's context of {context}; lower sequence_length"
        )


def require_matching_run(config: RunConfig, folder: Path) -> None:
    """A folder that holds something else, or a run of other settings, is left alone."""
    old = folder / "config.yaml"
    if not old.is_file():
        if folder.is_dir() and any(entry.name != "run.lock" for entry in folder.iterdir()):
            raise UsageError(f"{folder} is not empty and no run; choose another --out")
    elif list_checkpoints(folder / "checkpoints"):
        settings = load_raw_config(str(old))
        if settings.tree.get("recipe") != config.recipe:
            other = settings.tree.get("recipe")
            raise BusyError(f"{folder} holds a run of another recipe ({other}); choose another --out")
        changed = config_differences(parse_config(type(config), settings), config, KEYS_FREE_ON_RESUME)
        if changed:
            listing = "; ".join(changed[:6]) + (f"; and {len(changed) - 6} more" if len(changed) > 6 else "")
            raise BusyError(
                f"{folder} holds a run of other settings ({listing}).\n"
                f"Go on with its own (quest train {folder}) or choose another --out"
            )


def init_run_dir(config: RunConfig, folder: Path, parallel: DistributedContext) -> None:
    """The run's folder with its config, for recipes that write into it before their run begins. All look before the
    leader writes, and none goes on before the leader has written."""
    require_matching_run(config, folder)
    parallel.all_gather(None)
    if parallel.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / "config.yaml", config_to_yaml(config))
    parallel.all_gather(None)


def open_run_dir(
    config: RunConfig,
    folder: Path,
    parallel: DistributedContext,
    identity: Mapping[str, str],
    env: Mapping[str, Any],
    resume: str,
) -> RunDir:
    """The run's folder, to be entered. identity: name -> hash of what a resumed run may not change."""
    return RunDir(
        folder,
        config=config_to_yaml(config),
        env={**env, "hashes": dict(identity)},
        identity=identity,
        resume=resume,
        is_main_process=parallel.is_main_process,
    )


def build_optimizer(
    config: RunConfig, model: Any, adamw_parameters: Sequence[str] = ("embed.", "head.")
) -> torch.optim.Optimizer:
    """AdamW or Muon over what is trained; Muon gets the rows that are matrices of their own and the names of AdamW's
    parameters."""
    common: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.adam_betas,
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optim == "adamw":
        return make_adamw(model, **common)
    return make_muon(
        model, row_splits=model.row_splits(), adamw_prefixes=adamw_parameters, momentum=config.muon_momentum, **common
    )


def build_lr_schedule(config: RunConfig) -> LRSchedule:
    """The multiplier of the peak rate at each step."""
    return make_lr_schedule(
        config.max_steps,
        warmup_steps=config.warmup_steps,
        shape=config.lr_scheduler_type,
        min_lr_ratio=config.min_lr_ratio,
        decay_fraction=config.lr_decay_ratio,
    )


def train_settings(config: RunConfig, *, expected_loss: float | None = None) -> TrainingArguments:
    """The engine's view of the config, whose `auto`s are decided."""
    return TrainingArguments(
        steps=config.max_steps,
        max_grad_norm=config.max_grad_norm,
        log_every=config.logging_steps,
        save_every=config.save_steps,
        keep_last=config.save_total_limit,
        keep_every=config.keep_every,
        metric_for_best_model=config.metric_for_best_model or "",
        greater_is_better=config.greater_is_better,
        on_disk_full=config.on_disk_full,
        async_save=config.async_save,
        max_nonfinite_steps=config.max_nonfinite_steps,
        max_empty_steps=config.max_empty_steps,
        precision=config.precision,
        compile=bool(config.compile),
        max_seconds=config.max_seconds,
        seed=derive_seed(config.seed, "dropout"),
        expected_loss=expected_loss,
    )


def make_display(config: RunConfig, folder: Path, parallel: DistributedContext, quiet: bool) -> Logger:
    """The progress display, TensorBoard beside it if asked for."""
    screen = make_logger(parallel.rank, quiet=quiet)
    return (
        TensorBoardLogger(folder / "tensorboard", screen) if config.tensorboard and parallel.is_main_process else screen
    )


def finish_run(
    config: RunConfig,
    folder: Path,
    result: TrainResult,
    parameters: int,
    *,
    leader: bool,
    baselines: Mapping[str, float] | None = None,
) -> RunOutcome:
    """The outcome, left in the run folder as summary.json."""
    outcome = RunOutcome(
        run=str(folder),
        status=result.status,
        step=result.step,
        steps=config.max_steps,
        exit_code=result.exit_code,
        parameters=parameters,
        seconds=result.seconds,
        tokens_per_second=result.tokens_per_second,
        metrics=dict(result.metrics),
        baselines=baselines or {},
    )
    if leader:
        atomic_write_json(folder / "summary.json", outcome.as_json())
    return outcome
