"""What fine-tuning will cost before it starts: `quest plan sft`, `reward`, `dpo`, `classify`. The recipe is assembled
as for training (it reads its rows and its model), and the largest micro-batch of its first steps is counted and timed;
nothing is written.

Rows are of all lengths, so a step is what its tokens cost: as many as the first steps have on average. Of a preference
run the reference's log-probabilities are planned too: one forward pass over every answer, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llm_quest.cost.plan import (
    BYTES_PER_PARAMETER,
    EXPECTED_UTILIZATION,
    TIMED_STEPS,
    ResourceEstimate,
    estimate_resources,
    parameter_memory,
    teacher_memory,
    time_call,
)
from llm_quest.cost.profile import StepProfile, profile_step, time_step
from llm_quest.data.preference_pairs import PreferenceBatch
from llm_quest.formatting import align_columns, format_duration, format_quantity
from llm_quest.models.build import family_of
from llm_quest.objectives.distillation import DistillationLoss
from llm_quest.recipes import classify, dpo, reward, sft
from llm_quest.recipes.auto import resolve_precision
from llm_quest.recipes.classify import ClassifyConfig
from llm_quest.recipes.dpo import DpoConfig
from llm_quest.recipes.recipe import Context, Job
from llm_quest.recipes.reference_model import SyncedReference
from llm_quest.recipes.reward import RewardConfig
from llm_quest.recipes.run import build_optimizer
from llm_quest.recipes.sft import SftConfig
from llm_quest.recipes.techniques import split_checkpointing
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.techniques.activation_checkpointing import disable_checkpointing
from llm_quest.train.parallel import DistributedContext, resolve_device

LogFn = Callable[[str], None]
FinetuningConfig = SftConfig | RewardConfig | DpoConfig | ClassifyConfig

SAMPLED_STEPS = 8
"""So many steps tell how long rows are."""


@dataclass(frozen=True, kw_only=True)
class TuningPlan(ResourceEstimate):
    """things: what a row of the batch is. epochs: how often each is seen. memory: bytes by kind while the largest
    micro-batch goes backward. once_flops, once_seconds: before the first step. step_seconds: measured if `measured`,
    else predicted from `peak_gflops`."""

    model: str
    parameters: int
    learned: int
    things: str
    things_per_step: int
    tokens_per_step: float
    steps: int
    epochs: float
    flops_per_token: float
    flops: float
    once_flops: float
    measured: bool
    step_seconds: float
    once_seconds: float
    seconds: float

    def lines(self) -> list[str]:
        how = (
            f"{TIMED_STEPS} real steps timed"
            if self.measured
            else f"predicted at {EXPECTED_UTILIZATION:.0%} of the matrix-product peak"
        )
        a_step = self.flops_per_token * self.tokens_per_step
        share = a_step / self.step_seconds / 1e9 / self.peak_gflops
        speed = f"{self.tokens_per_step / self.step_seconds:,.0f} tokens/s, {share:.0%} of the peak"
        work = (
            f"{self.steps:,} steps of {self.things_per_step:,} {self.things}, about {self.tokens_per_step:,.0f} tokens"
        )
        once = f"{self.once_flops:.3g} FLOPs, about {format_duration(self.once_seconds)}"
        facts = [
            ("model", f"{self.model}, {self.parameters:,} parameters, {self.learned:,} of them trained"),
            (
                "work",
                f"{work} ({format_quantity(round(self.steps * self.tokens_per_step))} in all, {self.epochs:.3g} epochs)",
            ),
            (
                "FLOPs",
                f"{self.flops_per_token / 1e6:,.4g} M a token, {a_step / 1e9:,.4g} G a step, {self.flops:.3g} in all",
            ),
            *([("before: the reference", once)] if self.once_flops else []),
            *self.resource_rows(),
            ("a step", f"{self.step_seconds:.3g} s, {speed} ({how})"),
            ("the run", format_duration(self.seconds)),
        ]
        return align_columns(facts) + self.memory_warning(
            "fewer rows at once (micro_batch_size), or gradient_checkpointing=true"
        )


def plan_tuning(config: FinetuningConfig, *, measure: bool, log: LogFn) -> TuningPlan:
    """The cost of a recipe on this machine. measure: time real steps."""
    device = resolve_device(config.device)
    context = Context(Path(), DistributedContext(), log, RawConfig({}, ""), planning=True)
    job = JOB_BUILDERS[type(config)](config, context)
    model, bf16 = job.model.to(device).train(), resolve_precision(config.precision, device).value == "bf16"
    largest, tokens = sample_micro_batches(job, config.max_steps)
    batch = largest.to(device)
    cost = profile_with_checkpointing(config, job, batch, device, bf16)
    each, rows = cost.total_flops / largest.num_tokens, config.batch_size
    once = reference_flops(config, job, cost.forward_flops / largest.num_tokens * tokens / rows)
    if measure:
        log(f"timing {TIMED_STEPS} real steps on {largest.num_tokens:,} tokens")
    stepper, memory = build_optimizer(config, model), estimate_tuning_memory(config, job, cost)
    machine = estimate_resources(memory, save_total_limit=config.save_total_limit, bf16=bf16, device=device)
    rate = EXPECTED_UTILIZATION * machine["peak_gflops"] * 1e9
    step = each * tokens / rate
    if measure:
        took = time_step(job.objective, stepper, batch, device, bf16)
        step, rate = (
            took.total(tokens / largest.num_tokens),
            cost.forward_flops / time_forward(job, batch, device, bf16),
        )
    return TuningPlan(
        model=family_of(model.config).name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        learned=memory["gradients"] // BYTES_PER_PARAMETER,
        things=ROW_NAMES[type(config)],
        things_per_step=rows,
        tokens_per_step=tokens,
        steps=config.max_steps,
        epochs=config.max_steps * rows / len(inner_loader(job).source),
        flops_per_token=each,
        flops=each * tokens * config.max_steps + once,
        once_flops=once,
        measured=measure,
        step_seconds=step,
        once_seconds=once / rate,
        seconds=step * config.max_steps + once / rate,
        **machine,
    )


def sample_micro_batches(job: Job, steps: int) -> tuple[Any, float]:
    """The largest micro-batch of the first steps, and how many tokens a step has."""
    some = [job.loader.batches(step) for step in range(min(SAMPLED_STEPS, steps))]
    batches: list[Any] = [batch for step in some for batch in step]
    largest = max(batches, key=lambda batch: batch.num_tokens)
    if isinstance(largest, PreferenceBatch):  # what the reference thinks of it makes no difference to the cost
        largest = replace(largest, reference_log_probs=torch.zeros(len(largest.input_ids)))
    return largest, sum(batch.num_tokens for batch in batches) / len(some)


def profile_with_checkpointing(
    config: FinetuningConfig, job: Job, batch: Any, device: torch.device, bf16: bool
) -> StepProfile:
    """One micro-batch. A checkpointed model keeps what it keeps, and the largest block in full on the way back."""
    cost = profile_step(job.objective, batch, device, bf16)
    if split_checkpointing(config.techniques, config.gradient_checkpointing)[1]:
        with disable_checkpointing(job.model):
            largest = profile_step(job.objective, batch, device, bf16).largest_block_bytes
        cost = replace(cost, saved_bytes=cost.saved_bytes + largest)
    return cost


@torch.no_grad()
def time_forward(job: Job, batch: Any, device: torch.device, bf16: bool) -> float:
    """Of a pass that nothing is learned from; the least of three."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return min(time_call(lambda: job.objective(batch), device) for _ in range(TIMED_STEPS))


def reference_flops(config: FinetuningConfig, job: Job, a_pair: float) -> float:
    """Of the reference's log-probabilities: of held-out pairs always, of all where no model computes them on the way.
    a_pair: of the objective's forward pass, which is two where one does."""
    if not isinstance(config, DpoConfig):
        return 0.0
    if job.objective.reference is not None:
        return a_pair / 2 * float(job.facts["held_out_rows"])
    return a_pair * float(job.facts["held_out_rows"] + job.facts["train_rows"])


def estimate_tuning_memory(config: FinetuningConfig, job: Job, cost: StepProfile) -> dict[str, int]:
    memory = {**parameter_memory(job.model, config.optim), "activations": cost.saved_bytes}
    memory |= teacher_memory(next((one for one in job.objective.modules() if isinstance(one, DistillationLoss)), None))
    return memory | ({"reference": memory["weights"]} if isinstance(job.loader, SyncedReference) else {})


def inner_loader(job: Job) -> Any:
    """The feed of rows, where a moving reference stands before it."""
    return job.loader.feed if isinstance(job.loader, SyncedReference) else job.loader


JOB_BUILDERS: dict[type, Callable[[Any, Context], Job]] = {
    SftConfig: sft.build_sft,
    RewardConfig: reward.build_reward,
    DpoConfig: dpo.build_dpo,
    ClassifyConfig: classify.build_classify,
}
ROW_NAMES = {SftConfig: "rows", RewardConfig: "pairs", DpoConfig: "pairs", ClassifyConfig: "texts"}
