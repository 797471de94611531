"""TrainState: everything of a run that a checkpoint holds."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from llm_quest.contracts import Loader
from llm_quest.errors import DataError
from llm_quest.machine.hardware import processor_name
from llm_quest.train.guards import NonFiniteGuard
from llm_quest.train.optimizers import LRSchedule
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.state_dict import (
    RNGState,
    load_model_state_dict,
    load_optimizer_state_dict,
    model_state_dict,
    optimizer_state_dict,
)


@dataclass
class Progress:
    """How far a run is. step: how many steps are done. train_seconds: time spent in steps alone. best_metric,
    best_step: of the metric by which the best checkpoint is kept. latest_metrics: the newest value of every metric."""

    step: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    best_metric: float | None = None
    best_step: int | None = None
    latest_metrics: dict[str, Any] = field(default_factory=dict)


class TrainState:
    """Model, optimizer, loader, learning-rate schedule, guard and random-number generators of a run, and its progress.

    `state_dict` and `load_state_dict` are all that a checkpoint needs. The schedule is a function of the step and has
    no state of its own. settings: what else the bits of a run depend on (precision, compilation), by name."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loader: Loader,
        schedule: LRSchedule,
        guard: NonFiniteGuard,
        rng: RNGState,
        *,
        parallel: DistributedContext | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self.model, self.optimizer, self.loader, self.schedule = model, optimizer, loader, schedule
        self.guard, self.rng, self.parallel = guard, rng, parallel or DistributedContext()
        self.settings = dict(settings or {})
        self.progress = Progress()
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def set_learning_rate(self) -> None:
        """Give every parameter group the learning rate of the current step."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.schedule(self.progress.step)

    def state_dict(self) -> dict[str, Any]:
        """ "model" and "optimizer" are tensors on the CPU by name, the rest is JSON. Every process takes part in
        gathering; the tensors are held by the main process alone. Nothing depends on the number of processes, but for
        the loaders' and generators' states, of which there is one for each."""
        keep = self.parallel.is_main_process
        tensors, numbers = optimizer_state_dict(self.model, self.optimizer, keep)
        values = {
            "progress": asdict(self.progress),
            "guard": self.guard.state_dict(),
            "optimizer_class": type(self.optimizer).__name__,
            "optimizer_numbers": numbers,
            "loaders": self.parallel.all_gather(self.loader.state_dict()),
            "rng": self.parallel.all_gather(self.rng.state_dict()),
            "environment": self.environment(),
        }
        return {
            "model": model_state_dict(self.model, keep),
            "optimizer": tensors,
            **json.loads(json.dumps(values)),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state. With another number of processes than it was saved with, every process seeds
        its generators anew. DataError or ValueError for the state of another run."""
        saved, own = state_dict["optimizer_class"], type(self.optimizer).__name__
        if saved != own:
            raise DataError(f"the checkpoint's optimizer is {saved}, this run's is {own}")
        load_model_state_dict(self.model, state_dict["model"])
        load_optimizer_state_dict(self.model, self.optimizer, state_dict["optimizer"], state_dict["optimizer_numbers"])
        self.progress = Progress(**state_dict["progress"])
        self.guard.load_state_dict(state_dict["guard"])
        same_world_size = len(state_dict["rng"]) == self.parallel.world_size
        rank = self.parallel.rank if same_world_size else 0
        self.loader.load_state_dict(state_dict["loaders"][rank])
        if same_world_size:
            self.rng.load_state_dict(state_dict["rng"][rank])
        else:
            self.rng.seed(self.progress.step)

    def environment(self) -> dict[str, Any]:
        """What the same bits after resuming rest on."""
        return {
            "threads": torch.get_num_threads(),
            "processes": self.parallel.world_size,
            "parallel": self.parallel.strategy,
            "device": self.parallel.device.type,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "processor": processor_name(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            **self.settings,
        }

    def environment_changes(self, state_dict: Mapping[str, Any]) -> list[str]:
        """What is not as it was when this state was saved, so that the last bits may differ."""
        return [
            f"{name} was {before} and is {value}: the resumed run may differ from the straight one in its last bits"
            for name, value in self.environment().items()
            if (before := state_dict["environment"].get(name, value)) != value
        ]
