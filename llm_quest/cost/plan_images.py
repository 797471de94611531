"""What a run that looks will cost before it starts: `quest plan vit`, `quest plan vlm`. The recipe is assembled as for
training (it reads its images), its techniques are applied, and one micro-batch of it is counted and timed; nothing is
written.

With activation checkpointing memory is what a pass then keeps, and the largest block in full, which costs one forward
pass more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.cost.plan import (
    BYTES_PER_PARAMETER,
    EXPECTED_UTILIZATION,
    TIMED_STEPS,
    ResourceEstimate,
    estimate_resources,
    parameter_memory,
)
from llm_quest.cost.profile import profile_step, time_step
from llm_quest.formatting import align_columns, format_duration
from llm_quest.models.build import family_of
from llm_quest.recipes.auto import resolve_precision
from llm_quest.recipes.recipe import Context
from llm_quest.recipes.run import build_optimizer
from llm_quest.recipes.techniques import apply_techniques, split_checkpointing
from llm_quest.recipes.vit import VitConfig, build_vit
from llm_quest.recipes.vlm import VlmConfig, build_vlm
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.techniques.activation_checkpointing import ActivationCheckpointing
from llm_quest.train.parallel import DistributedContext, resolve_device


@dataclass(frozen=True, kw_only=True)
class ImagePlan(ResourceEstimate):
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
        how = (
            f"{TIMED_STEPS} real steps timed"
            if self.measured
            else f"predicted at {EXPECTED_UTILIZATION:.0%} of the matrix-product peak"
        )
        a_step = self.flops_per_image * self.images_per_step
        an_image = f"{self.flops_per_image / 1e6:,.4g} M an image"
        share = a_step / self.step_seconds / 1e9 / self.peak_gflops
        speed = f"{self.images_per_step / self.step_seconds:,.0f} images/s, {share:.0%} of the peak"
        facts = [
            ("model", f"{self.model}, {self.parameters:,} parameters, {self.learned:,} of them trained"),
            ("work", f"{self.steps:,} steps of {self.images_per_step:,} images"),
            ("FLOPs", f"{an_image}, {a_step / 1e9:,.4g} G a step, {self.flops:.3g} in all"),
            *self.resource_rows(),
            ("a step", f"{self.step_seconds:.3g} s, {speed} ({how})"),
            ("the run", format_duration(self.seconds)),
        ]
        return align_columns(facts) + self.memory_warning(
            "fewer images at once (micro_batch_size), or gradient_checkpointing=true"
        )


def plan_images(config: VitConfig | VlmConfig, *, measure: bool, log: Callable[[str], None]) -> ImagePlan:
    """The cost of a recipe on this machine. measure: time real steps."""
    device = resolve_device(config.device)
    context = Context(Path(), DistributedContext(), log, RawConfig({}, ""), planning=True)
    bare = config.model_copy(update={"techniques": (), "gradient_checkpointing": False})
    job = build_vlm(bare, context) if isinstance(bare, VlmConfig) else build_vit(bare, context)
    entries, checkpointed = split_checkpointing(config.techniques, config.gradient_checkpointing)
    apply_techniques(entries, job.model, log)
    model, bf16 = job.model.to(device).train(), resolve_precision(config.precision, device).value == "bf16"
    batch: Any = job.loader.batches(0)[0].to(device)
    rows, counts = batch.images.shape[0], [parameter.numel() for parameter in model.parameters()]
    cost = profile_step(job.objective, batch, device, bf16)
    kept = cost.saved_bytes
    if checkpointed:
        ActivationCheckpointing()(model)
        kept = profile_step(job.objective, batch, device, bf16).saved_bytes + cost.largest_block_bytes
    stepper = build_optimizer(config, model, job.adamw_parameters)
    if measure:
        log(f"timing {TIMED_STEPS} real steps of {sum(counts):,} parameters")
    memory = {**parameter_memory(model, config.optim, job.adamw_parameters), "activations": kept}
    machine = estimate_resources(memory, save_total_limit=config.save_total_limit, bf16=bf16, device=device)
    micro_batches = -(-config.batch_size // rows)
    took = time_step(job.objective, stepper, batch, device, bf16).total(micro_batches) if measure else None
    done = cost.total_flops + cost.forward_flops * checkpointed
    step = done * micro_batches / (EXPECTED_UTILIZATION * machine["peak_gflops"] * 1e9) if took is None else took
    return ImagePlan(
        model=family_of(model.config).name,
        parameters=sum(counts),
        learned=memory["gradients"] // BYTES_PER_PARAMETER,
        images_per_step=config.batch_size,
        steps=config.max_steps,
        flops_per_image=cost.total_flops // rows,
        flops=float(cost.total_flops * micro_batches * config.max_steps),
        measured=measure,
        step_seconds=step,
        seconds=step * config.max_steps,
        **machine,
    )
