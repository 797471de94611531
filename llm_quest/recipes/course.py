"""How a run goes on, whatever it learns: what all recipes have in common around `train.loop.train`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from llm_quest.disk import replace_json, replace_text
from llm_quest.errors import BusyError, UsageError
from llm_quest.recipes.config import as_yaml, differences, gather, resolve
from llm_quest.recipes.parts import FREE, Course
from llm_quest.recipes.parts import Optimizer as OptimizerPart
from llm_quest.train.checkpoint import listed
from llm_quest.train.log import Board, Display, display
from llm_quest.train.optimizers import adamw, muon
from llm_quest.train.parallel import Parallel
from llm_quest.train.run import Run, finite
from llm_quest.train.settings import Result, Settings
from llm_quest.train.state import derive_seed


@dataclass(frozen=True)
class Outcome:
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
        return asdict(self) | {"metrics": finite(self.metrics), "scores": finite(self.scores)}

    def lines(self) -> list[str]:
        """For the screen."""
        told = [
            f"{self.status} at step {self.step} of {self.steps}, {self.parameters:,} parameters, "
            f"{self.seconds:.0f} s: {self.run}"
        ]
        if self.scores:
            told.append("held out: " + ", ".join(f"{name} {value:.4g}" for name, value in self.scores.items()))
        if self.baselines:
            told.append("others, bits per byte: " + ", ".join(f"{name} {b:.3f}" for name, b in self.baselines.items()))
        if self.status != "finished":
            told.append(f"go on with: quest train {self.run}")
        return told


@contextmanager
def company(config: Course, rows: int) -> Iterator[Parallel]:
    """Threads, device and the other processes, for as long as a run takes. rows: of one step, over all of them."""
    if config.threads:
        torch.set_num_threads(config.threads)
    parallel = Parallel.from_environment(config.device, config.parallel)
    try:
        if rows % parallel.world:
            raise UsageError(f"batch.rows {rows} can't be shared by {parallel.world} processes; make it a multiple")
        yield parallel
    finally:
        parallel.close()


AT_ONCE = 8192
"""Tokens of a micro-batch, where its rows are not given."""


class Rows(Protocol):
    """The rows of an optimiser step, over all processes, and those of a micro-batch, where they are given."""

    @property
    def rows(self) -> int: ...
    @property
    def micro_rows(self) -> int | None: ...


def micro_rows_of(part: Rows, parallel: Parallel, length: int) -> int:
    """Rows of a micro-batch: what was asked for, else the largest equal part of this process's rows within AT_ONCE
    tokens. length: tokens of the longest row."""
    mine = part.rows // parallel.world
    if part.micro_rows is not None:
        return min(part.micro_rows, mine)
    most = max(1, min(mine, AT_ONCE // length))
    return max(number for number in range(1, most + 1) if mine % number == 0)


def require_run(where: str, key: str, made: str) -> None:
    """UsageError for a run that is not there, which would be looked for on the hub. key: of the recipe; made: the
    command that trains one."""
    if where.startswith("runs/") and not Path(where).is_dir():
        raise UsageError(f"there is no run {where}: train one first ({made}), or give {key}=FOLDER")


def require_context(length: int, context: int) -> None:
    """Rows no longer than what the model can see."""
    if length > context:
        raise UsageError(f"batch.length {length} is longer than the model's context of {context}; lower batch.length")


def require_same_run(config: Course, folder: Path) -> None:
    """A folder that holds something else, or a run of other settings, is left alone."""
    old = folder / "config.yaml"
    if not old.is_file():
        if folder.is_dir() and any(entry.name != "run.lock" for entry in folder.iterdir()):
            raise UsageError(f"{folder} is not empty and no run; choose another --out")
    elif listed(folder / "checkpoints"):
        settings = gather(str(old))
        if settings.tree.get("recipe") != config.recipe:
            other = settings.tree.get("recipe")
            raise BusyError(f"{folder} holds a run of another recipe ({other}); choose another --out")
        changed = differences(resolve(type(config), settings), config, FREE)
        if changed:
            listing = "; ".join(changed[:6]) + (f"; and {len(changed) - 6} more" if len(changed) > 6 else "")
            raise BusyError(
                f"{folder} holds a run of other settings ({listing}).\n"
                f"Go on with its own (quest train {folder}) or choose another --out"
            )


def founded(config: Course, folder: Path, parallel: Parallel) -> None:
    """The run's folder with its config, for recipes that write into it before their run begins. All look before the
    leader writes."""
    require_same_run(config, folder)
    parallel.gather(None)
    if parallel.leader:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "config.yaml", as_yaml(config))


def folder_of(
    config: Course, folder: Path, parallel: Parallel, identity: Mapping[str, str], env: Mapping[str, Any], resume: str
) -> Run:
    """The run's folder, to be entered. identity: name -> hash of what a resumed run may not change."""
    return Run(
        folder,
        config=as_yaml(config),
        env={**env, "hashes": dict(identity)},
        identity=identity,
        resume=resume,
        leader=parallel.leader,
    )


def optimizer(part: OptimizerPart, model: Any, by_adamw: Sequence[str] = ("embed.", "head.")) -> torch.optim.Optimizer:
    """AdamW or Muon over what is trained; Muon is told which rows are matrices of their own, and what is AdamW's."""
    common: dict[str, Any] = {"lr": part.lr, "betas": part.betas, "eps": part.eps, "weight_decay": part.weight_decay}
    if part.name == "adamw":
        return adamw(model, **common)
    return muon(model, splits=model.row_splits(), by_adamw=by_adamw, momentum=part.momentum, **common)


def loop_settings(config: Course, *, expected_loss: float | None = None) -> Settings:
    """The engine's view of the config, whose `auto`s are decided."""
    return Settings(
        steps=config.steps,
        clip=config.clip,
        log_every=config.log_every,
        save_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        precision=config.precision,
        compile=bool(config.compile),
        max_time=config.seconds,
        seed=derive_seed(config.seed, "dropout"),
        expected_loss=expected_loss,
    )


def shown(config: Course, folder: Path, parallel: Parallel, quiet: bool) -> Display:
    """The progress display, TensorBoard beside it if asked for."""
    screen = display(parallel.rank, quiet=quiet)
    return Board(folder / "tensorboard", screen) if config.tensorboard and parallel.leader else screen


def ended(
    config: Course,
    folder: Path,
    result: Result,
    parameters: int,
    *,
    leader: bool,
    baselines: Mapping[str, float] | None = None,
) -> Outcome:
    """The outcome, left in the run folder as summary.json."""
    outcome = Outcome(
        run=str(folder),
        status=result.status,
        step=result.step,
        steps=config.steps,
        exit_code=result.exit_code,
        parameters=parameters,
        seconds=result.seconds,
        tokens_per_second=result.tokens_per_second,
        metrics=dict(result.metrics),
        baselines=baselines or {},
    )
    if leader:
        replace_json(folder / "summary.json", outcome.as_json())
    return outcome
