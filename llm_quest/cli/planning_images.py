"""What a run that looks will cost before it starts: `quest plan vit`, `quest plan vlm`. The recipe is assembled as for
training (it reads its images), its techniques are applied, and one micro-batch of it is counted and timed; nothing is
written.

With activation checkpointing memory is what a pass then keeps, and the largest block in full, which costs one forward
pass more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import nn

from llm_quest.cli.counting import counted, timed
from llm_quest.cli.machine import matmul_peak
from llm_quest.cli.planning import MASTER, REACHED, SPARE_MEMORY, STEPS
from llm_quest.models.build import page_of
from llm_quest.recipes.choices import precision
from llm_quest.recipes.course import optimizer
from llm_quest.recipes.techniques import applied_all, without_checkpointing
from llm_quest.recipes.vision_config import Vit, Vlm
from llm_quest.recipes.vit import assembled as assembled_vit
from llm_quest.recipes.vlm import assembled as assembled_vlm
from llm_quest.report.words import aligned, duration, size
from llm_quest.techniques.checkpointing import Checkpointing
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
            told.append(
                "warning: more memory is needed than there is: fewer images at once (batch.micro_rows), or "
                "activation_checkpointing=true"
            )
        return told


def plan_images(config: Vit | Vlm, *, measure: bool, say: Callable[[str], None]) -> ImagePlan:
    """The cost of a recipe on this machine. measure: time real steps."""
    device, parallel = pick_device(config.device), Parallel()
    job = assembled_vlm(config, parallel, say) if isinstance(config, Vlm) else assembled_vit(config, parallel, say)
    entries, checkpointed = without_checkpointing(config.techniques, config.activation_checkpointing)
    applied_all(entries, job.model, say)
    model, bf16 = job.model.to(device).train(), precision(config.precision, device).value == "bf16"
    batch: Any = job.feed.at(0)[0].to(device)
    rows, counts = batch.images.shape[0], [parameter.numel() for parameter in model.parameters()]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cost = counted(job.objective, batch, device, bf16)
    kept = cost.kept
    if checkpointed:
        Checkpointing()(model)
        kept = counted(job.objective, batch, device, bf16).kept + cost.largest
    stepper = optimizer(config.optimizer, model, job.by_adamw)
    if measure:
        say(f"timing {STEPS} real steps of {sum(counts):,} parameters")
    peak = matmul_peak(2048, torch.bfloat16 if bf16 else torch.float32, str(device))
    micro_batches = -(-config.batch.rows // rows)
    took = timed(job.objective, stepper, batch, device, bf16).of(micro_batches) if measure else None
    done = cost.flops + cost.forward * checkpointed
    step = done * micro_batches / (REACHED * peak * 1e9) if took is None else took
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
        flops_per_image=cost.flops // rows,
        flops=float(cost.flops * micro_batches * config.steps),
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


def held(model: nn.Module, name: str, by_adamw: Any) -> int:
    """Bytes of the optimiser's state: two numbers for each learned one, one where Muon turns a matrix."""
    numbers = 0
    for path, parameter in model.named_parameters():
        matrix = name == "muon" and parameter.ndim == 2 and not path.startswith(tuple(by_adamw))
        numbers += parameter.numel() * (1 if matrix else 2) * parameter.requires_grad
    return numbers * MASTER
