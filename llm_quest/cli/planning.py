"""What a run will cost before it starts: `quest plan`. Counts are made, not guessed, on a model without memory:

- FLOPs: PyTorch's counter over one forward pass, three times that for training (backward costs twice the forward
  pass; once, where the matrices are frozen and an adapter learns).
- Activations: the bytes that a forward pass of the real modules hands to autograd, counted tensor by tensor, weights
  left out; under bfloat16 autocast that includes the cast copies of the weights. With activation checkpointing: one
  stream of width D per block, and one block in full.
- Loss: 2 float32 logits per token and vocabulary entry (the logits and their softmax; 2.5 from bfloat16) for all rows
  at once, or for 256 rows and the head's gradient where the chunked form is used.
- A teacher: its weights, its forward pass, and the student's head once more for the divergence, 256 rows at once.
- Time: a few real steps of the real model, or the machine's matrix-product rate and the share of it that training
  reaches."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llm_quest.cli.costs import flops_per_token
from llm_quest.cli.machine import matmul_peak
from llm_quest.data.batch import TokenBatch
from llm_quest.errors import UsageError
from llm_quest.models.build import build, count_parameters, page_of, skeleton
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.cross_entropy import LARGE, ROWS
from llm_quest.objectives.distillation import Distillation
from llm_quest.objectives.next_token import NextToken
from llm_quest.recipes.techniques import applied_all
from llm_quest.report.words import aligned, duration, quantity, size
from llm_quest.scope import Scope
from llm_quest.techniques.checkpointing import Checkpointing
from llm_quest.train.optimizers import adamw, muon

MASTER = 4
REACHED = 0.5
STEPS = 3
SPARE_MEMORY = 0.9
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class Work:
    """What is to be done: `steps` optimiser steps of `rows` rows of `length` tokens, `micro_rows` at once, on `world`
    processes.

    config: a page's. optimizer: adamw | muon. precision: fp32 | bf16 (autocast over float32 masters). keep:
    checkpoints that lie on disk at once. checkpointing: activations are computed again in the backward pass.
    techniques: entries of a recipe's `techniques`. teacher: the term beside the loss, with a real teacher."""

    config: Any
    rows: int
    length: int
    steps: int
    micro_rows: int | None = None
    optimizer: str = "adamw"
    precision: str = "fp32"
    checkpointing: bool = False
    keep: int = 2
    world: int = 1
    device: str = "cpu"
    techniques: tuple[Mapping[str, Any], ...] = ()
    teacher: Distillation | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "length", "steps", "world"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.length > self.config.context:
            raise UsageError(
                f"rows of {self.length} tokens are longer than the model's context of {self.config.context}"
            )
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"no optimizer is called {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"no precision is called {self.precision!r}; known: fp32, bf16")

    def edited(self, model: Decoder) -> Decoder:
        """The model after the techniques."""
        applied_all(self.techniques, model, lambda text: None)
        return model

    @property
    def at_once(self) -> int:
        """Rows of one micro-batch on one process."""
        mine = math.ceil(self.rows / self.world)
        return min(self.micro_rows or mine, mine)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on one process."""
        return math.ceil(self.rows / self.world / self.at_once)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What every plan tells of the machine. memory: bytes by kind on one process."""

    memory: dict[str, int]
    memory_available: int
    checkpoint_bytes: int
    disk_bytes: int
    precision: str
    peak_gflops: float

    @property
    def memory_total(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_total <= SPARE_MEMORY * self.memory_available

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"memory_total": self.memory_total}

    def needs(self) -> list[tuple[str, str]]:
        """For the screen."""
        return [
            *((f"memory: {kind}", size(held)) for kind, held in self.memory.items()),
            ("memory: together", f"{size(self.memory_total)} of {size(self.memory_available)} available now"),
            ("a checkpoint", f"{size(self.checkpoint_bytes)}; {size(self.disk_bytes)} on disk at most"),
            ("matrix products", f"{self.peak_gflops:,.0f} GFLOP/s in {self.precision}, measured on 2048 x 2048"),
        ]

    def warned(self, remedy: str) -> list[str]:
        """A line where it does not fit."""
        return [] if self.fits else [f"warning: more memory is needed than there is: {remedy}"]


def footprint(memory: dict[str, int], *, keep: int, bf16: bool, device: torch.device | str) -> dict[str, Any]:
    """A `Footprint`'s fields. keep: checkpoints that lie on disk at once, beside one that is being written."""
    saved = memory["weights"] + memory["optimizer"]
    return {
        "memory": memory,
        "memory_available": psutil.virtual_memory().available,
        "checkpoint_bytes": saved,
        "disk_bytes": saved * (keep + 1),
        "precision": "bf16" if bf16 else "fp32",
        "peak_gflops": matmul_peak(2048, torch.bfloat16 if bf16 else torch.float32, str(device)),
    }


@dataclass(frozen=True, kw_only=True)
class Plan(Footprint):
    """step_seconds: measured if `measured`, else predicted from `peak_gflops`.
    utilization: FLOPs of a step per second and process, as a share of the peak. warnings: what will not fit, and what
    to do."""

    model: str
    parameters: int
    tokens_per_step: int
    steps: int
    tokens: int
    tokens_per_parameter: float
    flops_per_token: int
    flops_per_step: int
    flops: float
    measured: bool
    step_seconds: float
    tokens_per_second: float
    utilization: float
    seconds: float
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        how = f"{STEPS} real steps timed" if self.measured else f"predicted at {REACHED:.0%} of the matrix-product peak"
        work = f"{self.steps:,} steps of {self.tokens_per_step:,} tokens = {quantity(self.tokens)} tokens"
        a_token, a_step = f"{self.flops_per_token / 1e6:,.4g} M a token", f"{self.flops_per_step / 1e9:,.4g} G a step"
        speed = f"{self.tokens_per_second:,.0f} tokens/s, {self.utilization:.0%} of the peak"
        facts = [
            ("model", f"{self.model}, {self.parameters:,} parameters"),
            ("work", f"{work}, {self.tokens_per_parameter:.3g} per parameter"),
            ("FLOPs", f"{a_token}, {a_step}, {self.flops:.3g} in all"),
            *self.needs(),
            ("a step", f"{self.step_seconds:.3g} s, {speed} ({how})"),
            ("the run", duration(self.seconds)),
        ]
        return aligned(facts) + [f"warning: {warning}" for warning in self.warnings]


def plan(work: Work, *, measure: bool = True, say: Callable[[str], None] = lambda text: None) -> Plan:
    """The cost of a piece of work on this machine. measure: time real steps, unless the model would not fit."""
    model = work.edited(skeleton(work.config))
    parameters = count_parameters(model)
    passes = 3 if learned(model) > parameters // 2 else 2
    forward = sum(flops_per_token(work.config, work.length))
    per_token = passes * forward + taught_flops(work)
    tokens_per_step = work.rows * work.length
    memory = memory_by_kind(work, model)
    machine = footprint(memory, keep=work.keep, bf16=work.precision == "bf16", device=work.device)
    available, peak = machine["memory_available"], machine["peak_gflops"]
    fits = sum(memory.values()) < SPARE_MEMORY * available
    again = forward if work.checkpointing else 0
    predicted = (per_token + again) * tokens_per_step / work.world / (REACHED * peak * 1e9)
    if measure and fits:
        say(f"timing {STEPS} real steps of {parameters:,} parameters")
    step_seconds = timed_step(work) if measure and fits else predicted
    return Plan(
        model=page_of(work.config).name,
        parameters=parameters,
        tokens_per_step=tokens_per_step,
        steps=work.steps,
        tokens=tokens_per_step * work.steps,
        tokens_per_parameter=tokens_per_step * work.steps / parameters,
        flops_per_token=per_token,
        flops_per_step=per_token * tokens_per_step,
        flops=float(per_token * tokens_per_step * work.steps),
        measured=measure and fits,
        step_seconds=step_seconds,
        tokens_per_second=tokens_per_step / step_seconds,
        utilization=per_token * tokens_per_step / work.world / step_seconds / 1e9 / peak,
        seconds=step_seconds * work.steps,
        warnings=tuple(warnings(work, memory, available)),
        **machine,
    )


def memory_by_kind(work: Work, model: Decoder) -> dict[str, int]:
    """Bytes on one process while a micro-batch goes backward. model: on the meta device."""
    rows = work.at_once * work.length
    vocab, width = model.head.weight.shape  # type: ignore[union-attr, misc]
    held = 8 if work.precision == "fp32" else 10
    chunked = rows * vocab * 4 > LARGE
    logits = ROWS * vocab * (held + 2) + 4 * (vocab + rows) * width if chunked else rows * vocab * held
    resting = of_parameters(model, work.optimizer) | teacher_bytes(work.teacher)
    return {**resting, "activations": activation_bytes(work), "loss": logits + taught_bytes(work, vocab, width)}


def teacher_bytes(term: Distillation | None) -> dict[str, int]:
    """The teacher's weights."""
    return {} if term is None else {"teacher": sum(p.nbytes for p in term.teacher.model.parameters())}


def taught_bytes(work: Work, vocab: int, width: int) -> int:
    """The divergence: eight tensors of 256 rows (eleven where there is a mixture), measured; the head's gradient; what
    both heads read."""
    if work.teacher is None:
        return 0
    rows, tensors = work.at_once * work.length, 8 if work.teacher.beta in (0, 1) else 11
    read = width + work.teacher.teacher.model.config.width
    return 4 * (min(ROWS, rows) * vocab * tensors + vocab * width + rows * read)


def taught_flops(work: Work) -> int:
    """What a teacher adds for each token: its forward pass, and the student's head for a second loss; of two that are
    learned forward and backward, of a cross-entropy that is only looked at forward."""
    if work.teacher is None:
        return 0
    head = 2 * work.config.vocab * work.config.width
    again = head if work.teacher.weight == 1 else 3 * head
    return again + sum(flops_per_token(work.teacher.teacher.model.config, work.length))


def of_parameters(model: nn.Module, optimizer: str, by_adamw: Sequence[str] = ("embed.", "head.")) -> dict[str, int]:
    """Bytes of the weights, of the gradients, and of the optimiser's state: two numbers for each that learns, one where
    Muon turns a matrix."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    turned = [
        p.numel()
        for name, p in trained.items()
        if optimizer == "muon" and p.ndim == 2 and not name.startswith(tuple(by_adamw))
    ]
    return {
        "weights": MASTER * sum(p.numel() for p in model.parameters()),
        "gradients": MASTER * learned(model),
        "optimizer": MASTER * (2 * learned(model) - sum(turned)),
    }


def learned(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def activation_bytes(work: Work) -> int:
    """What one micro-batch leaves for the backward pass, packed documents included."""
    with FakeTensorMode():
        model = work.edited(page_of(work.config).assemble(work.config)).train()
        tokens = torch.zeros(work.at_once, work.length, dtype=torch.int64)
        whole = kept_for_backward(model, tokens, work.precision == "bf16")
    if not work.checkpointing:
        return whole
    stream: int = work.at_once * work.length * work.config.width * 4
    return len(model.blocks) * stream + whole // len(model.blocks)


def kept_for_backward(model: Decoder, tokens: Tensor, bf16: bool) -> int:
    """Bytes of the storages that a pass over packed rows hands to autograd, each once, parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    scope = Scope(positions, segments=torch.zeros_like(tokens))
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.hidden(tokens, scope)
    del hidden
    return sum(storage.nbytes() for storage in kept.values())


def timed_step(work: Work) -> float:
    """Seconds of one optimiser step: micro-batches and the update are timed apart, medians of three after one to warm
    up."""
    device = torch.device(work.device)
    model = work.edited(build(work.config, device=device)).train()
    if work.checkpointing:
        Checkpointing()(model)
    objective = NextToken(model, beside=[work.teacher] if work.teacher else [])
    optimizer = adamw(model, lr=0.0) if work.optimizer == "adamw" else muon(model, lr=0.0, splits=model.row_splits())
    batch = random_batch(work).to(device)
    micro, update = [], []
    for _ in range(1 + STEPS):
        micro.append(clocked(lambda: backward(objective, batch, work.precision == "bf16"), device))
        update.append(clocked(lambda: advance(model, optimizer), device))
    return work.micro_batches * statistics.median(micro[1:]) + statistics.median(update[1:])


def random_batch(work: Work) -> TokenBatch:
    """One micro-batch of random tokens, packed as a feed packs documents: two of them in a row."""
    known = work.config.vocab if work.teacher is None else work.teacher.ids
    drawn = torch.randint(0, known, (work.at_once, work.length + 1), generator=torch.Generator().manual_seed(0))
    half = work.length // 2
    positions = torch.cat((torch.arange(half), torch.arange(work.length - half))).expand(work.at_once, -1)
    segments = (torch.arange(work.length) >= half).long().expand(work.at_once, -1)
    return TokenBatch(drawn[:, :-1], drawn[:, 1:], positions, segments)


def backward(objective: nn.Module, batch: TokenBatch, bf16: bool) -> None:
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=bf16):
        loss = objective(batch)
    (loss.total / loss.count).backward()


def advance(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def clocked(run: Callable[[], None], device: torch.device) -> float:
    """Seconds until the device has done it."""
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def warnings(work: Work, memory: dict[str, int], available: int) -> list[str]:
    """What will not fit, with the cheapest remedies first."""
    total = sum(memory.values())
    if work.device != "cpu" or total < SPARE_MEMORY * available:
        return []
    resting = sum(memory.get(kind, 0) for kind in ("weights", "gradients", "optimizer", "teacher"))
    if resting > available:
        remedy = "take a smaller model, or share it between processes (fsdp)"
        return [f"weights, gradients and optimizer need {size(resting)}, {size(available)} are available: {remedy}"]
    remedies = [f"fewer rows at once (micro_rows below {work.at_once})"] if work.at_once > 1 else []
    if not work.checkpointing:
        checkpointed = activation_bytes(replace(work, checkpointing=True))
        remedies.append(f"activation checkpointing (saves {size(memory['activations'] - checkpointed)})")
    remedies.append("shorter rows" if memory["activations"] > memory["weights"] else "a smaller model")
    return [f"{size(total)} are needed and {size(available)} are available; cheapest remedies: {', '.join(remedies)}"]
