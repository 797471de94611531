"""What a run that looks will cost before it starts: `quest plan vit`, `quest plan vlm`. The recipe is assembled as for
training (it reads its images), and one micro-batch of it is counted and timed; nothing is written.

FLOPs by PyTorch's counter over a forward pass, three times that for training; activations: the bytes that this pass
hands to autograd, each storage once, parameters left out (`planning` says the same of text)."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llm_quest.cli.costs import formulas
from llm_quest.cli.machine import matmul_peak
from llm_quest.cli.planning import MASTER, REACHED, SPARE_MEMORY, STEPS, advance, clocked
from llm_quest.models.build import page_of
from llm_quest.recipes.choices import precision
from llm_quest.recipes.course import optimizer
from llm_quest.recipes.vision import Job
from llm_quest.recipes.vision_config import Vit, Vlm
from llm_quest.recipes.vit import assembled as assembled_vit
from llm_quest.recipes.vlm import assembled as assembled_vlm
from llm_quest.report.words import aligned, duration, size
from llm_quest.train.parallel import Parallel, pick_device


@dataclass(frozen=True)
class ImagePlan:
    """memory: bytes by kind while a micro-batch goes backward. flops_per_image: of training, the words about it
    included. step_seconds: measured if `measured`, else predicted from `peak_gflops`."""

    model: str
    parameters: int
    learned: int
    images_per_step: int
    steps: int
    flops_per_image: int
    flops: float
    memory: dict[str, int]
    memory_total: int
    memory_available: int
    checkpoint_bytes: int
    disk_bytes: int
    precision: str
    peak_gflops: float
    measured: bool
    step_seconds: float
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        how = f"{STEPS} real steps timed" if self.measured else f"predicted at {REACHED:.0%} of the matrix-product peak"
        a_step = self.flops_per_image * self.images_per_step
        an_image = f"{self.flops_per_image / 1e6:,.4g} M an image"
        share = a_step / self.step_seconds / 1e9 / self.peak_gflops
        speed = f"{self.images_per_step / self.step_seconds:,.0f} images/s, {share:.0%} of the peak"
        facts = [
            ("model", f"{self.model}, {self.parameters:,} parameters, {self.learned:,} of them trained"),
            ("work", f"{self.steps:,} steps of {self.images_per_step:,} images"),
            ("FLOPs", f"{an_image}, {a_step / 1e9:,.4g} G a step, {self.flops:.3g} in all"),
            *((f"memory: {kind}", size(held)) for kind, held in self.memory.items()),
            ("memory: together", f"{size(self.memory_total)} of {size(self.memory_available)} available now"),
            ("a checkpoint", f"{size(self.checkpoint_bytes)}; {size(self.disk_bytes)} on disk at most"),
            ("matrix products", f"{self.peak_gflops:,.0f} GFLOP/s in {self.precision}, measured on 2048 x 2048"),
            ("a step", f"{self.step_seconds:.3g} s, {speed} ({how})"),
            ("the run", duration(self.seconds)),
        ]
        told = aligned(facts)
        if self.memory_total > SPARE_MEMORY * self.memory_available:
            told.append("warning: more memory is needed than there is: fewer images at once (batch.micro_rows)")
        return told


def plan_images(config: Vit | Vlm, *, measure: bool, say: Callable[[str], None]) -> ImagePlan:
    """The cost of a recipe on this machine. measure: time real steps."""
    device, parallel = pick_device(config.device), Parallel()
    job = assembled_vlm(config, parallel, say)[0] if isinstance(config, Vlm) else assembled_vit(config, parallel, say)
    model, bf16 = job.model.to(device).train(), precision(config.precision, device).value == "bf16"
    batch: Any = job.feed.at(0)[0].to(device)
    rows, counts = batch.images.shape[0], [parameter.numel() for parameter in model.parameters()]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    forward, kept = counted(job.objective, batch, bf16)
    stepper = optimizer(config.optimizer, model, job.by_adamw)
    if measure:
        say(f"timing {STEPS} real steps of {sum(counts):,} parameters")
    peak = matmul_peak(2048, torch.bfloat16 if bf16 else torch.float32, str(device))
    micro_batches = -(-config.batch.rows // rows)
    took = timed(job, stepper, batch, micro_batches, bf16) if measure else None
    step = 3 * forward * micro_batches / (REACHED * peak * 1e9) if took is None else took
    memory = {
        "weights": MASTER * sum(counts),
        "gradients": MASTER * sum(parameter.numel() for parameter in learned),
        "optimizer": held(model, config.optimizer.name, job.by_adamw),
        "activations": kept,
    }
    saved = memory["weights"] + memory["optimizer"]
    return ImagePlan(
        model=page_of(model.config).name,
        parameters=sum(counts),
        learned=sum(parameter.numel() for parameter in learned),
        images_per_step=config.batch.rows,
        steps=config.steps,
        flops_per_image=3 * forward // rows,
        flops=3.0 * forward * micro_batches * config.steps,
        memory=memory,
        memory_total=sum(memory.values()),
        memory_available=psutil.virtual_memory().available,
        checkpoint_bytes=saved,
        disk_bytes=saved * (config.checkpoint.keep + 1),
        precision="bf16" if bf16 else "fp32",
        peak_gflops=peak,
        measured=measure,
        step_seconds=step,
        seconds=step * config.steps,
    )


def counted(objective: nn.Module, batch: Any, bf16: bool) -> tuple[int, int]:
    """FLOPs of a micro-batch's forward pass, and the bytes it keeps for the backward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    counter = FlopCounterMode(display=False, custom_mapping=formulas())
    with counter, hooks, torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
        loss = objective(batch)
    del loss
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


def held(model: nn.Module, name: str, by_adamw: Any) -> int:
    """Bytes of the optimiser's state: two numbers for each learned one, one where Muon turns a matrix."""
    numbers = 0
    for path, parameter in model.named_parameters():
        matrix = name == "muon" and parameter.ndim == 2 and not path.startswith(tuple(by_adamw))
        numbers += parameter.numel() * (1 if matrix else 2) * parameter.requires_grad
    return numbers * MASTER


def timed(job: Job, stepper: torch.optim.Optimizer, batch: Any, micro_batches: int, bf16: bool) -> float:
    """Seconds of an optimiser step: micro-batch and update timed apart, medians of three after one to warm up."""
    device = batch.images.device

    def backward() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = job.objective(batch)
        (loss.total / loss.count).backward()

    micro, update = [], []
    for _ in range(1 + STEPS):
        micro.append(clocked(backward, device))
        update.append(clocked(lambda: advance(job.model, stepper), device))
    return micro_batches * statistics.median(micro[1:]) + statistics.median(update[1:])
