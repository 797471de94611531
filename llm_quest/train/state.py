"""TrainState: the state of a run that a checkpoint holds, as tensors by parameter name and as JSON.

Nothing here depends on the number of processes: sharded tensors are gathered when saved and sharded when loaded."""

from __future__ import annotations

import json
import operator
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llm_quest.contracts import Loader
from llm_quest.errors import DataError
from llm_quest.machine.hardware import processor_name
from llm_quest.tensor_files import align
from llm_quest.train.divergence import DivergenceMonitor
from llm_quest.train.guards import NonFiniteGuard
from llm_quest.train.optimizers import LRSchedule
from llm_quest.train.parallel import DistributedContext, copy_full_, full_tensor, shard_as
from llm_quest.train.rng_state import RNGState

KEY_SEPARATOR = "|"
TensorLoader = Callable[[nn.Module, Optimizer, Mapping[str, Any]], None]
"""Fills model and optimizer in place; the third are the optimizer's plain numbers."""


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once, under their first name."""
    seen: set[int] = set()
    named = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            named[name] = tensor
    return named


def model_state_dict(model: nn.Module, is_main_process: bool) -> dict[str, Tensor]:
    """A copy of `tensors_by_name` on the CPU, gathered. Every process takes part in gathering; only the main process
    keeps it."""
    return {name: _copy_to_cpu(tensor) for name, tensor in _gather_full(tensors_by_name(model)) if is_main_process}


def load_model_state_dict(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Load into the model, in place. ValueError lists every name or shape that does not match."""
    own = tensors_by_name(model)
    require_same_tensors(own, {name: tensor.shape for name, tensor in saved.items()})
    for name, tensor in own.items():
        copy_full_(tensor, saved[name])


def require_same_tensors(own: Mapping[str, Tensor], saved: Mapping[str, torch.Size]) -> None:
    """ValueError lists every name or shape of a checkpoint that is not the model's."""
    wrong = [f"missing {name}" for name in own if name not in saved]
    wrong += [f"unexpected {name}" for name in saved if name not in own]
    both = [name for name in own if name in saved and own[name].shape != saved[name]]
    wrong += [f"{name} is {tuple(saved[name])}, the model's is {tuple(own[name].shape)}" for name in both]
    if wrong:
        raise ValueError(
            f"the checkpoint is of another model: {'; '.join(wrong[:8])}{' ...' if len(wrong) > 8 else ''}"
        )


def optimizer_entries(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`parameter|key` -> tensor, as it is; and the values that are plain numbers."""
    entries = {
        f"{name}{KEY_SEPARATOR}{key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in entries.items() if not isinstance(value, Tensor)}
    return tensors, numbers


def optimizer_state_dict(
    model: nn.Module, optimizer: Optimizer, is_main_process: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`parameter|key` -> tensor, gathered and on the CPU; and the values that are plain numbers."""
    tensors, numbers = optimizer_entries(model, optimizer)
    return {name: _copy_to_cpu(value) for name, value in _gather_full(tensors) if is_main_process}, numbers


def load_optimizer_state_dict(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Load into the optimizer. What has the parameter's shape is sharded as the parameter is; what lies in a file,
    and not on a 64-byte boundary, is copied."""
    named = dict(model.named_parameters())
    unknown = sorted({key.split(KEY_SEPARATOR)[0] for key in [*tensors, *numbers]} - set(named))
    if unknown:
        raise ValueError(
            f"the checkpoint's optimizer has parameters that the model does not have: {', '.join(unknown[:8])}"
        )
    optimizer.state.clear()
    for key, value in [*tensors.items(), *numbers.items()]:
        name, _, entry = key.partition(KEY_SEPARATOR)
        p = named[name]
        if isinstance(value, Tensor) and value.shape == p.shape:
            value = shard_as(p, align(value))
        elif isinstance(value, Tensor):
            value = align(value).to(p.device)
        optimizer.state[p][entry] = value


def _gather_full(named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """One at a time, so that no more than one is whole on the device."""
    for name, tensor in named.items():
        yield name, full_tensor(tensor)


def _copy_to_cpu(t: Tensor) -> Tensor:
    return t.to("cpu", copy=True).contiguous()


@dataclass
class PendingRow:
    """The row of metrics of a step whose evaluations a signal ended: the resumed run makes them up before it logs the
    row. is_last: they are those at the end of the run. is_tracked: the best metric and the patience are updated
    already."""

    COUNTERS: ClassVar = frozenset(
        {"step", "tokens", "learning_rate", "num_targets", "tokens_per_second", "train_seconds", "skipped_steps"}
        | {"empty_steps"}
    )
    """What is no metric in a row: no model is chosen by it."""
    row: dict[str, Any]
    is_last: bool
    is_tracked: bool = False

    def __post_init__(self) -> None:
        """TypeError for what is no row of metrics."""
        bad = [name for name, value in self.row.items() if not isinstance(value, int | float)]
        if bad or self.COUNTERS - self.row.keys():
            raise TypeError(f"a row of metrics lacks a number: {str(bad or self.COUNTERS)[:60]}")


@dataclass
class Progress:
    """The progress of a run. step: how many steps are done. train_seconds: time spent in steps alone. best_metric,
    best_step, best_name: of the metric by which the best checkpoint is kept. good_step: of the checkpoint from before
    the run began to fail, which is kept too; None while it is healthy. latest_metrics: the newest value of every
    metric. pending: the last step's row, while its evaluations are to be made up."""

    step: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    best_metric: float | None = None
    best_step: int | None = None
    best_name: str = ""
    measurements_since_best: int = 0
    good_step: int | None = None
    latest_metrics: dict[str, Any] = field(default_factory=dict)
    pending: PendingRow | None = None

    def __post_init__(self) -> None:
        """TypeError for a value of another type, ValueError for a step below 0: the values may come from a file."""
        for name in ("step", "tokens", "measurements_since_best", "best_step", "good_step"):
            value = getattr(self, name)
            if not (value is None and name.endswith("_step")):
                setattr(self, name, operator.index(value))
        self.train_seconds, self.best_name = float(self.train_seconds), str(self.best_name)
        self.best_metric = None if self.best_metric is None else float(self.best_metric)
        self.latest_metrics = dict(self.latest_metrics)
        if self.pending is not None and not isinstance(self.pending, PendingRow):
            self.pending = PendingRow(**self.pending)
        if self.step < 0:
            raise ValueError(f"step is {self.step}")


class TrainState:
    """Model, optimizer, loader, learning-rate schedule, guard and random-number generators of a run, and its progress.

    `state_dict` and `load_state_dict` are all that a checkpoint needs. The schedule is a function of the step and has
    no state of its own. settings: what else the bits of a run depend on (precision, compilation), by name. objective:
    its own persistent buffers (what it measures over several steps) are kept too, for each process."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loader: Loader,
        schedule: LRSchedule,
        guard: NonFiniteGuard,
        rng: RNGState,
        *,
        divergence: DivergenceMonitor | None = None,
        parallel: DistributedContext | None = None,
        settings: Mapping[str, Any] | None = None,
        objective: nn.Module | None = None,
    ):
        self.objective = objective
        self.model, self.optimizer, self.loader, self.schedule = model, optimizer, loader, schedule
        self.guard, self.rng, self.parallel = guard, rng, parallel or DistributedContext()
        self.divergence = divergence or DivergenceMonitor()
        self.settings = dict(settings or {})
        self.progress = Progress()
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def set_learning_rate(self) -> None:
        """Set the learning rate of the current step in every parameter group."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.schedule(self.progress.step)

    def objective_buffers(self) -> dict[str, Tensor]:
        """Copies of the objective's own buffers, by name."""
        if self.objective is None:
            return {}
        hidden = self.objective._non_persistent_buffers_set
        return {name: t.clone() for name, t in self.objective.named_buffers(recurse=False) if name not in hidden}

    def restore_objective(self, buffers: Mapping[str, Any]) -> None:
        """Copy these values, tensors or lists of numbers, into the objective's own buffers."""
        for name, own in self.objective_buffers().items():
            if name in buffers:
                setattr(self.objective, name, torch.as_tensor(buffers[name]).to(own).reshape(own.shape))

    def state_dict(self) -> dict[str, Any]:
        """ "model" and "optimizer" are tensors on the CPU by name, the rest is JSON. Every process takes part in
        gathering; the tensors are held by the main process alone (under FSDP2 nothing is gathered: they are the sharded
        tensors themselves). Nothing depends on the number of processes, but for the loaders' and generators' states, of
        which there is one for each."""
        keep, sharded = self.parallel.is_main_process, self.parallel.strategy == "fsdp"
        tensors, numbers = (
            optimizer_entries(self.model, self.optimizer)
            if sharded
            else optimizer_state_dict(self.model, self.optimizer, keep)
        )
        values = {
            "progress": asdict(self.progress),
            "guard": self.guard.state_dict(),
            "divergence": self.divergence.state_dict(),
            "optimizer_class": type(self.optimizer).__name__,
            "optimizer_numbers": numbers,
            "loaders": self.parallel.all_gather(self.loader.state_dict()),
            "rng": self.parallel.all_gather(self.rng.state_dict()),
            "objectives": self.parallel.all_gather({k: t.tolist() for k, t in self.objective_buffers().items()}),
            "environment": self.environment(),
        }
        return {
            "model": tensors_by_name(self.model) if sharded else model_state_dict(self.model, keep),
            "optimizer": tensors,
            **json.loads(json.dumps(values)),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], load_tensors: TensorLoader | None = None) -> None:
        """Continue from a saved state. load_tensors: where its tensors are not in it. With another number of processes
        than it was saved with, every process seeds its generators anew. DataError or ValueError for the state of
        another run."""
        saved, own = state_dict["optimizer_class"], type(self.optimizer).__name__
        if saved != own:
            raise DataError(f"the checkpoint's optimizer is {saved}, this run's is {own}")
        numbers = state_dict["optimizer_numbers"]
        if load_tensors is None:
            load_model_state_dict(self.model, state_dict["model"])
            load_optimizer_state_dict(self.model, self.optimizer, state_dict["optimizer"], numbers)
        else:
            load_tensors(self.model, self.optimizer, numbers)
        self.progress = Progress(**state_dict["progress"])
        self.guard.load_state_dict(state_dict["guard"])
        self.divergence.load_state_dict(state_dict.get("divergence", {}))
        same_world_size = len(state_dict["rng"]) == self.parallel.world_size
        rank = self.parallel.rank if same_world_size else 0
        self.loader.load_state_dict(state_dict["loaders"][rank])
        if same_world_size:
            self.rng.load_state_dict(state_dict["rng"][rank])
            if "objectives" in state_dict:  # older checkpoints have none
                self.restore_objective(state_dict["objectives"][rank])
        else:
            self.rng.seed(self.progress.step)

    def environment(self) -> dict[str, Any]:
        """The settings and software that must be equal for a resumed run to have the same bits."""
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
        """A line for each change since this state was saved that may change the last bits."""
        return [
            f"{name} was {before} and is {value}: the resumed run may differ from the straight one in its last bits"
            for name, value in self.environment().items()
            if (before := state_dict["environment"].get(name, value)) != value
        ]
