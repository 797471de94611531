"""Training with several processes: DDP (every process holds the model) or FSDP2 (every process holds a part of it).

The loop uses `parallelize` (before the optimizer is made), `wrap_model`, `all_reduce_` and `broadcast`. Both strategies
*add* gradients: the loop divides once by the count of the whole step, so a run on many processes is the run on one, up
to the rounding of sums. A parameter that an objective does not use has no gradient, as on one process, and no optimizer
touches it. Every process must bring the same number of micro-batches to a step of FSDP2 (one with nothing to learn is
allowed). `torchrun` starts the processes; without it there is one.

Commonly got wrong: FSDP2 communicates in every forward pass, so a schedule that a process derives from its own rows
(how many fit into a micro-batch, whether to evaluate) hangs as soon as two processes derive different ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm_quest.contracts import DataShard
from llm_quest.errors import MissingError, UsageError
from llm_quest.files import parse_digits
from llm_quest.tensor_files import align
from llm_quest.train.data_parallel import DataParallel
from llm_quest.train.failures import ProcessStore, open_sockets, share_failures
from llm_quest.train.signals import SignalHandler

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

PARALLEL_STRATEGIES = ("ddp", "fsdp")


@dataclass(frozen=True)
class DistributedContext:
    """Rank, world size, device and strategy of this process. `DistributedContext()` is one process on the CPU.
    owns_group: whether it made the process group. store: see `train/failures.py`."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    strategy: str = "single"
    owns_group: bool = False
    store: ProcessStore | None = None

    @classmethod
    def from_environment(cls, device: str = "auto", strategy: str = "ddp") -> DistributedContext:
        """Make the context from torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK) and join the process group: nccl on
        CUDA, gloo elsewhere."""
        if strategy not in PARALLEL_STRATEGIES:
            raise UsageError(f"no parallel engine is called {strategy!r}; known: {', '.join(PARALLEL_STRATEGIES)}")
        chosen = resolve_device(device, int(os.environ.get("LOCAL_RANK", "0")))
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls(device=chosen)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        sockets: set[tuple[int, int]] = set()
        if owned := not dist.is_initialized():
            sockets = init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return cls(rank, world_size, chosen, strategy, owned, ProcessStore(rank, world_size, sockets))

    @property
    def is_main_process(self) -> bool:
        """Whether this is the one process that writes."""
        return self.rank == 0

    @property
    def data_shard(self) -> DataShard:
        """The shard of the data that this process reads."""
        return DataShard(self.rank, self.world_size)

    def parallelize(self, objective: nn.Module, blocks: Sequence[nn.Module] = ()) -> nn.Module:
        """Move the objective to the device, lay every parameter out row by row from a 64-byte boundary on (a loaded
        matrix may be a transposed view of its file, or begin anywhere in it), make the processes equal, and for
        FSDP2 shard: each of `blocks` by itself, the rest with the objective.

        In place. Call it before the optimizer is made, because sharding replaces the parameters."""
        objective.to(self.device)
        for parameter in objective.parameters():
            parameter.data = align(parameter.data)
        if self.strategy == "single":
            return objective
        for tensor in [*objective.parameters(), *objective.buffers()]:
            dist.broadcast(tensor.data, 0)
        if self.strategy == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world_size,))
            whole = unshardable_parameters(objective, blocks)
            for module in [*blocks, objective]:
                fully_shard(module, mesh=mesh, ignored_params=whole)
            for module in objective.modules():
                if is_fsdp_module(module):
                    module.set_gradient_divide_factor(1.0)
                    module.set_force_sum_reduction_for_comms(True)
        return objective

    def wrap_model(self, objective: nn.Module) -> nn.Module:
        """The module that the loop calls: the objective itself, or `DataParallel` around it."""
        if self.strategy == "fsdp" and not is_fsdp_module(objective):
            raise ValueError(
                "FSDP2 shards before the optimizer is made: call parallel.parallelize(objective, blocks) first"
            )
        if self.strategy != "ddp":
            return objective
        return DataParallel(objective)

    @contextmanager
    def unshard_model(self, objective: nn.Module) -> Iterator[None]:
        """Gather what FSDP2 keeps with the root, so that the model can be called without the objective (evaluators)."""
        if is_fsdp_module(objective):
            objective.unshard()
        yield
        if is_fsdp_module(objective):
            objective.reshard()

    @contextmanager
    def gather_model(self, objective: nn.Module) -> Iterator[None]:
        """Gather a model that FSDP2 shards: inside it is whole in every process and its passes communicate nothing, so
        that each process may run another number of them (a policy that samples). Needs the memory of the whole
        model."""
        shards = [module for module in objective.modules() if is_fsdp_module(module)]
        if is_fsdp_module(objective):
            objective._get_fsdp_state()._lazy_init()  # else the first block that is called would become the root
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
        for module in shards:
            module.set_reshard_after_forward(module is not objective, recurse=False)
            module.reshard()

    def replicate(self) -> DistributedContext:
        """The context of the same processes, each with the whole model (DDP)."""
        return replace(self, strategy="ddp") if self.strategy == "fsdp" else self

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.strategy != "single":
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_replicated_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add, after the backward passes of a step, the gradients of the parameters that FSDP2 does not shard
        (`unshardable_parameters`)."""
        if self.strategy != "fsdp":
            return
        for p in parameters:
            if not is_sharded(p) and p.grad is not None:
                dist.all_reduce(p.grad)

    def require_equal_schedules(self, num_micro_batches: int, step: int) -> None:
        """Raise ValueError on every process if they have different numbers of micro-batches in a step: under FSDP2 they
        would wait for each other forever."""
        if self.strategy != "fsdp":
            return
        counts = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        counts[self.rank] = num_micro_batches
        dist.all_reduce(counts)
        if len(set(counts.tolist())) > 1:
            raise ValueError(
                f"the processes bring different numbers of micro-batches to step {step + 1}: {counts.tolist()}, by "
                "rank; a loader decides them from the rows of the whole step, or adds batches with nothing to learn"
            )

    def broadcast(self, thing: Any) -> Any:
        """The main process's object, on every process. The others wait for as long as the main process takes to make
        it (to read and to split a corpus, say): no time limit of a collective runs meanwhile."""
        self.wait_for_main_process()
        return self.all_gather(thing)[0]

    def wait_for_main_process(self) -> None:
        """Wait, without a time limit, until the main process calls this too; it waits for none."""
        if self.store is not None:
            self.store.wait_for_main_process(self.is_main_process)

    @contextmanager
    def handle_signals(self, echo_seconds: float) -> Iterator[SignalHandler]:
        """Handle signals inside: they stop the run, in all processes together. echo_seconds: of SignalHandler, with
        several."""
        if self.store is None:
            with SignalHandler() as signals:
                yield signals
            return
        with SignalHandler(echo_seconds if self.world_size > 1 else 0.0, self.store.announce_stop) as signals:
            self.store.on_stop = signals.stop_with_peer
            try:
                yield signals
            finally:
                self.store.on_stop = None

    @contextmanager
    def share_failures(self) -> Iterator[None]:
        """Make an error of one process end all of them, with its exit code."""
        if self.store is None:
            yield
            return
        with share_failures(self.store):
            yield

    def all_gather(self, thing: Any) -> list[Any]:
        """The objects of all processes, in the order of ranks."""
        if self.strategy == "single":
            return [thing]
        things: list[Any] = [None] * self.world_size
        try:
            if not self.is_abandoned():
                dist.all_gather_object(things, thing)
                return things
        except RuntimeError:
            if not self.is_abandoned():
                raise
        self.abandon()
        dist.all_gather_object(things, thing)
        return things

    @property
    def can_abandon(self) -> bool:
        """Whether a step can be given up."""
        return self.world_size == 1 or self.store is not None

    def is_abandoned(self) -> bool:
        """Whether a process has given up the step, or the evaluation, that all are in."""
        return self.store is not None and self.store.is_abandoned()

    def abandon(self) -> None:
        """Give up the step, or the evaluation: no process can complete it. No model may be called after this;
        collectives use another group."""
        if self.store is not None:
            self.store.leave_group()

    def first_nonempty(self, text: str) -> str:
        """The text of the first process that has one; empty if none has."""
        return next((one for one in self.all_gather(text) if one), "")

    def destroy_process_group(self) -> None:
        """Leave the process group, if this context made it."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()


def init_process_group(backend: str) -> set[tuple[int, int]]:
    """Join the process group; return the sockets that connect it."""
    store, rank, world_size = next(dist.rendezvous("env://"))
    before = open_sockets()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return open_sockets() - before


def parameters_in_place(objective: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name, parameter) of every parameter, for `put_parameters_back`: FSDP2 puts others there during a
    pass."""
    return [
        (module, name, p) for module in objective.modules() for name, p in module._parameters.items() if p is not None
    ]


def put_parameters_back(parameters: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> None:
    """Restore the parameters that FSDP2 replaced in a pass that was given up."""
    for module, name, p in parameters:
        module._parameters[name] = p


def unshardable_parameters(objective: nn.Module, blocks: Sequence[nn.Module]) -> set[nn.Parameter]:
    """The parameters that FSDP2 cannot shard: scalars (DyT's alpha), which have no rows, and parameters of several
    blocks (TinyLoRA's vectors), which one block's gathering would have to provide to another."""
    units: dict[nn.Parameter, set[int]] = {}
    for unit, block in enumerate(blocks):
        for p in block.parameters():
            units.setdefault(p, set()).add(unit)
    in_blocks = {module for block in blocks for module in block.modules()}
    for module in objective.modules():
        for p in module.parameters(recurse=False):
            if module not in in_blocks:
                units.setdefault(p, set()).add(len(blocks))
    return {p for p, owners in units.items() if p.ndim == 0 or len(owners) > 1}


@contextmanager
def gradient_accumulation(engine: nn.Module, sync_gradients: bool) -> Iterator[None]:
    """Synchronize gradients after the last micro-batch of a step only."""
    if is_fsdp_module(engine):
        engine.set_requires_gradient_sync(sync_gradients)
        yield
    elif isinstance(engine, DataParallel) and sync_gradients:
        with engine.reducer.synchronize():
            yield
    else:
        yield


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this name; auto takes an accelerator if there is one. Raises UsageError for an unknown kind,
    MissingError for a device that does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in there:
        raise UsageError(f"no device is called {name!r}; known: auto, {', '.join(there)} (and cuda:0, cuda:1, ...)")
    number_found = parse_digits(number)
    index = local_rank if number_found is None else number_found
    if (kind == "cuda" and index >= there[kind]) or not there[kind]:
        raise MissingError(
            f"device {name} is not there (found: {there[kind]} of its kind); use device=auto or device=cpu"
        )
    return torch.device(kind, index) if kind == "cuda" else torch.device(kind)


def is_sharded(t: Tensor) -> TypeIs[DTensor]:
    """Is it a DTensor, of which several processes hold a part each? Where nothing has imported DTensor there is none,
    and the second that its import takes is not spent."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(t, kind)


def is_fsdp_module(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Has FSDP2 sharded it? As `is_sharded`, without the import."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def local_tensor(t: Tensor) -> Tensor:
    """The local part of a tensor."""
    return t.to_local() if is_sharded(t) else t


def full_tensor(t: Tensor) -> Tensor:
    """The whole tensor, gathered from every process; shares memory with `t` where it was whole already."""
    return t.full_tensor().detach() if is_sharded(t) else t.detach()


def copy_full_(t: Tensor, value: Tensor) -> None:
    """Copy a full tensor into one that may be sharded."""
    with torch.no_grad():
        t.copy_(shard_as(t, value))


def shard_as(t: Tensor, value: Tensor) -> Tensor:
    """A full tensor on the device and with the sharding of `t`."""
    value = value.to(t.device)
    if is_sharded(t):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, t.device_mesh, t.placements, src_data_rank=None)
    return value
