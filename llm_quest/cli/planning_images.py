"""What a run that looks will cost before it starts: `quest plan vit`, `quest plan vlm`. The recipe is assembled as for
training (it reads its images), its techniques are applied, and one micro-batch of it is counted and timed; nothing is
written.

With activation checkpointing memory is what a pass then keeps, and the largest block in full, which costs one forward
pass more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llm_quest.cli.counting import counted, timed
from llm_quest.cli.planning import MASTER, REACHED, STEPS, Footprint, footprint, of_parameters
from llm_quest.models.build import page_of
from llm_quest.recipes.choices import precision
from llm_quest.recipes.course import optimizer
from llm_quest.recipes.techniques import applied_all, without_checkpointing
from llm_quest.recipes.vision_config import Vit, Vlm
from llm_quest.recipes.vit import assembled as assembled_vit
from llm_quest.recipes.vlm import assembled as assembled_vlm
from llm_quest.report.words import aligned, duration
from llm_quest.techniques.checkpointing import Checkpointing
from llm_quest.train.parallel import Parallel, pick_device


@dataclass(frozen=True, kw_only=True)
class ImagePlan(Footprint):
    """flops_per_image: of training, the words about it
    included. step_seconds: measured if `measured`, else predicted from `peak_gflops`."""

    model: str
    parameters: int
    learned: int
    images_per_step: int
    steps: int
    flops_per_image: int
    flops: float
    measured: bool
    step_seconds: float
    seconds: float

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
            *self.needs(),
            ("a step", f"{self.step_seconds:.3g} s, {speed} ({how})"),
            ("the run", duration(self.seconds)),
        ]
        return aligned(facts) + self.warned("fewer images at once (batch.micro_rows), or activation_checkpointing=true")


def plan_images(config: Vit | Vlm, *, measure: bool, say: Callable[[str], None]) -> ImagePlan:
    """The cost of a recipe on this machine. measure: time real steps."""
    device, parallel = pick_device(config.device), Parallel()
    job = assembled_vlm(config, parallel, say) if isinstance(config, Vlm) else assembled_vit(config, parallel, say)
    entries, checkpointed = without_checkpointing(config.techniques, config.activation_checkpointing)
    applied_all(entries, job.model, say)
    model, bf16 = job.model.to(device).train(), precision(config.precision, device).value == "bf16"
    batch: Any = job.feed.at(0)[0].to(device)
    rows, counts = batch.images.shape[0], [parameter.numel() for parameter in model.parameters()]
    cost = counted(job.objective, batch, device, bf16)
    kept = cost.kept
    if checkpointed:
        Checkpointing()(model)
        kept = counted(job.objective, batch, device, bf16).kept + cost.largest
    stepper = optimizer(config.optimizer, model, job.by_adamw)
    if measure:
        say(f"timing {STEPS} real steps of {sum(counts):,} parameters")
    memory = {**of_parameters(model, config.optimizer.name, job.by_adamw), "activations": kept}
    machine = footprint(memory, keep=config.checkpoint.keep, bf16=bf16, device=device)
    micro_batches = -(-config.batch.rows // rows)
    took = timed(job.objective, stepper, batch, device, bf16).of(micro_batches) if measure else None
    done = cost.flops + cost.forward * checkpointed
    step = done * micro_batches / (REACHED * machine["peak_gflops"] * 1e9) if took is None else took
    return ImagePlan(
        model=page_of(model.config).name,
        parameters=sum(counts),
        learned=memory["gradients"] // MASTER,
        images_per_step=config.batch.rows,
        steps=config.steps,
        flops_per_image=cost.flops // rows,
        flops=float(cost.flops * micro_batches * config.steps),
        measured=measure,
        step_seconds=step,
        seconds=step * config.steps,
        **machine,
    )
