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

from llm_quest.cli.doctor import matmul_peak
from llm_quest.cost.flops import ModelCost
from llm_quest.data.batch import TokenBatch
from llm_quest.errors import UsageError
from llm_quest.formatting import align_columns, format_bytes, format_duration, format_quantity
from llm_quest.models.build import build, build_meta_model, count_parameters, family_of
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.cross_entropy import CHUNK_ROWS, MAX_FULL_LOGITS_BYTES
from llm_quest.objectives.distillation import DistillationLoss
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.recipes.techniques import apply_techniques
from llm_quest.scope import Scope
from llm_quest.techniques.activation_checkpointing import ActivationCheckpointing
from llm_quest.train.optimizers import make_adamw, make_muon

BYTES_PER_PARAMETER = 4
EXPECTED_UTILIZATION = 0.5
TIMED_STEPS = 3
USABLE_MEMORY = 0.9
KNOWN_OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class TrainingWorkload:
    """What is to be done: `steps` optimiser steps of `rows` rows of `length` tokens, `micro_rows` at once, on
    `world_size` processes.

    config: a page's. optimizer: adamw | muon. precision: fp32 | bf16 (autocast over float32 masters). save_total_limit:
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
    save_total_limit: int = 2
    world: int = 1
    device: str = "cpu"
    techniques: tuple[Mapping[str, Any], ...] = ()
    teacher: DistillationLoss | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "length", "steps", "world"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.length > self.config.max_position_embeddings:
            raise UsageError(
                f"rows of {self.length} tokens are longer than the model's context of {self.config.max_position_embeddings}"
            )
        if self.optimizer not in KNOWN_OPTIMIZERS:
            raise UsageError(f"no optimizer is called {self.optimizer!r}; known: {', '.join(KNOWN_OPTIMIZERS)}")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"no precision is called {self.precision!r}; known: fp32, bf16")

    def with_techniques(self, model: Decoder) -> Decoder:
        """The model after the techniques."""
        apply_techniques(self.techniques, model, lambda text: None)
        return model

    @property
    def rows_per_micro_batch(self) -> int:
        """Rows of one micro-batch on one process."""
        mine = math.ceil(self.rows / self.world)
        return min(self.micro_rows or mine, mine)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on one process."""
        return math.ceil(self.rows / self.world / self.rows_per_micro_batch)


@dataclass(frozen=True, kw_only=True)
class ResourceEstimate:
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
        return self.memory_total <= USABLE_MEMORY * self.memory_available

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"memory_total": self.memory_total}

    def resource_rows(self) -> list[tuple[str, str]]:
        """For the screen."""
        return [
            *((f"memory: {kind}", format_bytes(held)) for kind, held in self.memory.items()),
            (
                "memory: together",
                f"{format_bytes(self.memory_total)} of {format_bytes(self.memory_available)} available now",
            ),
            ("a checkpoint", f"{format_bytes(self.checkpoint_bytes)}; {format_bytes(self.disk_bytes)} on disk at most"),
            ("matrix products", f"{self.peak_gflops:,.0f} GFLOP/s in {self.precision}, measured on 2048 x 2048"),
        ]

    def memory_warning(self, remedy: str) -> list[str]:
        """A line where it does not fit."""
        return [] if self.fits else [f"warning: more memory is needed than there is: {remedy}"]


def estimate_resources(
    memory: dict[str, int], *, save_total_limit: int, bf16: bool, device: torch.device | str
) -> dict[str, Any]:
    """A `ResourceEstimate`'s fields. save_total_limit: checkpoints that lie on disk at once, beside one that is being
    written."""
    saved = memory["weights"] + memory["optimizer"]
    return {
        "memory": memory,
        "memory_available": psutil.virtual_memory().available,
        "checkpoint_bytes": saved,
        "disk_bytes": saved * (save_total_limit + 1),
        "precision": "bf16" if bf16 else "fp32",
        "peak_gflops": matmul_peak(2048, torch.bfloat16 if bf16 else torch.float32, str(device)),
    }


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(ResourceEstimate):
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
        how = (
            f"{TIMED_STEPS} real steps timed"
            if self.measured
            else f"predicted at {EXPECTED_UTILIZATION:.0%} of the matrix-product peak"
        )
        work = f"{self.steps:,} steps of {self.tokens_per_step:,} tokens = {format_quantity(self.tokens)} tokens"
        a_token, a_step = f"{self.flops_per_token / 1e6:,.4g} M a token", f"{self.flops_per_step / 1e9:,.4g} G a step"
        speed = f"{self.tokens_per_second:,.0f} tokens/s, {self.utilization:.0%} of the peak"
        facts = [
            ("model", f"{self.model}, {self.parameters:,} parameters"),
            ("work", f"{work}, {self.tokens_per_parameter:.3g} per parameter"),
            ("FLOPs", f"{a_token}, {a_step}, {self.flops:.3g} in all"),
            *self.resource_rows(),
            ("a step", f"{self.step_seconds:.3g} s, {speed} ({how})"),
            ("the run", format_duration(self.seconds)),
        ]
        return align_columns(facts) + [f"warning: {warning}" for warning in self.warnings]


def plan_training(
    work: TrainingWorkload, *, measure: bool = True, log: Callable[[str], None] = lambda text: None
) -> TrainingPlan:
    """The cost of a piece of work on this machine. measure: time real steps, unless the model would not fit."""
    model = work.with_techniques(build_meta_model(work.config))
    parameters = count_parameters(model)
    passes = 3 if count_trainable(model) > parameters // 2 else 2
    forward = ModelCost.from_config(work.config).forward(work.length) // work.length
    per_token = passes * forward + distillation_flops(work)
    tokens_per_step = work.rows * work.length
    memory = estimate_training_memory(work, model)
    machine = estimate_resources(
        memory, save_total_limit=work.save_total_limit, bf16=work.precision == "bf16", device=work.device
    )
    available, peak = machine["memory_available"], machine["peak_gflops"]
    fits = sum(memory.values()) < USABLE_MEMORY * available
    again = forward if work.checkpointing else 0
    predicted = (per_token + again) * tokens_per_step / work.world / (EXPECTED_UTILIZATION * peak * 1e9)
    if measure and fits:
        log(f"timing {TIMED_STEPS} real steps of {parameters:,} parameters")
    step_seconds = measure_step_seconds(work) if measure and fits else predicted
    return TrainingPlan(
        model=family_of(work.config).name,
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
        warnings=tuple(memory_warnings(work, memory, available)),
        **machine,
    )


def estimate_training_memory(work: TrainingWorkload, model: Decoder) -> dict[str, int]:
    """Bytes on one process while a micro-batch goes backward. model: on the meta device."""
    rows = work.rows_per_micro_batch * work.length
    vocab, width = model.head.weight.shape  # type: ignore[union-attr, misc]
    held = 8 if work.precision == "fp32" else 10
    chunked = rows * vocab * 4 > MAX_FULL_LOGITS_BYTES
    logits = CHUNK_ROWS * vocab * (held + 2) + 4 * (vocab + rows) * width if chunked else rows * vocab * held
    resting = parameter_memory(model, work.optimizer) | teacher_memory(work.teacher)
    return {**resting, "activations": activation_memory(work), "loss": logits + distillation_memory(work, vocab, width)}


def teacher_memory(term: DistillationLoss | None) -> dict[str, int]:
    """The teacher's weights."""
    return {} if term is None else {"teacher": sum(p.nbytes for p in term.teacher.model.parameters())}


def distillation_memory(work: TrainingWorkload, vocab: int, width: int) -> int:
    """The divergence: eight tensors of 256 rows (eleven where there is a mixture), measured; the head's gradient; what
    both heads read."""
    if work.teacher is None:
        return 0
    rows, tensors = work.rows_per_micro_batch * work.length, 8 if work.teacher.beta in (0, 1) else 11
    read = width + work.teacher.teacher.model.config.hidden_size
    return 4 * (min(CHUNK_ROWS, rows) * vocab * tensors + vocab * width + rows * read)


def distillation_flops(work: TrainingWorkload) -> int:
    """What a teacher adds for each token: its forward pass, and the student's head for a second loss; of two that are
    learned forward and backward, of a cross-entropy that is only looked at forward."""
    if work.teacher is None:
        return 0
    head = 2 * work.config.vocab_size * work.config.hidden_size
    again = head if work.teacher.weight == 1 else 3 * head
    return again + ModelCost.from_config(work.teacher.teacher.model.config).forward(work.length) // work.length


def parameter_memory(
    model: nn.Module, optimizer: str, adamw_parameters: Sequence[str] = ("embed.", "head.")
) -> dict[str, int]:
    """Bytes of the weights, of the gradients, and of the optimiser's state: two numbers for each that learns, one where
    Muon turns a matrix."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    turned = [
        p.numel()
        for name, p in trained.items()
        if optimizer == "muon" and p.ndim == 2 and not name.startswith(tuple(adamw_parameters))
    ]
    return {
        "weights": BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters()),
        "gradients": BYTES_PER_PARAMETER * count_trainable(model),
        "optimizer": BYTES_PER_PARAMETER * (2 * count_trainable(model) - sum(turned)),
    }


def count_trainable(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def activation_memory(work: TrainingWorkload) -> int:
    """What one micro-batch leaves for the backward pass, packed documents included."""
    with FakeTensorMode():
        model = work.with_techniques(family_of(work.config).assemble(work.config)).train()
        tokens = torch.zeros(work.rows_per_micro_batch, work.length, dtype=torch.int64)
        whole = saved_for_backward(model, tokens, work.precision == "bf16")
    if not work.checkpointing:
        return whole
    stream: int = work.rows_per_micro_batch * work.length * work.config.hidden_size * 4
    return len(model.blocks) * stream + whole // len(model.blocks)


def saved_for_backward(model: Decoder, tokens: Tensor, bf16: bool) -> int:
    """Bytes of the storages that a pass over packed rows hands to autograd, each once, parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def record_storage(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    scope = Scope(positions, segment_ids=torch.zeros_like(tokens))
    hooks = torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.hidden_states(tokens, scope)
    del hidden
    return sum(storage.nbytes() for storage in kept.values())


def measure_step_seconds(work: TrainingWorkload) -> float:
    """Seconds of one optimiser step: micro-batches and the update are timed apart, medians of three after one to warm
    up."""
    device = torch.device(work.device)
    model = work.with_techniques(build(work.config, device=device)).train()
    if work.checkpointing:
        ActivationCheckpointing()(model)
    objective = NextTokenLoss(model, auxiliary=[work.teacher] if work.teacher else [])
    optimizer = (
        make_adamw(model, lr=0.0)
        if work.optimizer == "adamw"
        else make_muon(model, lr=0.0, row_splits=model.row_splits())
    )
    batch = make_random_batch(work).to(device)
    micro, update = [], []
    for _ in range(1 + TIMED_STEPS):
        micro.append(time_call(lambda: run_backward(objective, batch, work.precision == "bf16"), device))
        update.append(time_call(lambda: step_optimizer(model, optimizer), device))
    return work.micro_batches * statistics.median(micro[1:]) + statistics.median(update[1:])


def make_random_batch(work: TrainingWorkload) -> TokenBatch:
    """One micro-batch of random tokens, packed as a feed packs documents: two of them in a row."""
    known = work.config.vocab_size if work.teacher is None else work.teacher.vocab_size
    drawn = torch.randint(
        0, known, (work.rows_per_micro_batch, work.length + 1), generator=torch.Generator().manual_seed(0)
    )
    half = work.length // 2
    positions = torch.cat((torch.arange(half), torch.arange(work.length - half))).expand(work.rows_per_micro_batch, -1)
    segments = (torch.arange(work.length) >= half).long().expand(work.rows_per_micro_batch, -1)
    return TokenBatch(drawn[:, :-1], drawn[:, 1:], positions, segments)


def run_backward(objective: nn.Module, batch: TokenBatch, bf16: bool) -> None:
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=bf16):
        loss = objective(batch)
    (loss.total / loss.count).backward()


def step_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def time_call(run: Callable[[], None], device: torch.device) -> float:
    """Seconds until the device has done it."""
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def memory_warnings(work: TrainingWorkload, memory: dict[str, int], available: int) -> list[str]:
    """What will not fit, with the cheapest remedies first."""
    total = sum(memory.values())
    if work.device != "cpu" or total < USABLE_MEMORY * available:
        return []
    resting = sum(memory.get(kind, 0) for kind in ("weights", "gradients", "optimizer", "teacher"))
    if resting > available:
        remedy = "take a smaller model, or share it between processes (fsdp)"
        return [
            f"weights, gradients and optimizer need {format_bytes(resting)}, {format_bytes(available)} are available: {remedy}"
        ]
    remedies = (
        [f"fewer rows at once (micro_batch_size below {work.rows_per_micro_batch})"]
        if work.rows_per_micro_batch > 1
        else []
    )
    if not work.checkpointing:
        checkpointed = activation_memory(replace(work, checkpointing=True))
        remedies.append(f"activation checkpointing (saves {format_bytes(memory['activations'] - checkpointed)})")
    remedies.append("shorter rows" if memory["activations"] > memory["weights"] else "a smaller model")
    return [
        f"{format_bytes(total)} are needed and {format_bytes(available)} are available; cheapest remedies: {', '.join(remedies)}"
    ]
