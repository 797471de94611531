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

from llm_quest.cli.counting import Cost, counted, timed
from llm_quest.cli.planning import MASTER, REACHED, STEPS, Footprint, clocked, footprint, of_parameters, teacher_bytes
from llm_quest.data.pairs import AnswerBatch
from llm_quest.models.build import page_of
from llm_quest.objectives.distillation import Distillation
from llm_quest.recipes import classify, dpo, reward, sft
from llm_quest.recipes.choices import precision
from llm_quest.recipes.course import optimizer
from llm_quest.recipes.reference import Moving
from llm_quest.recipes.techniques import without_checkpointing
from llm_quest.recipes.tuning import Job
from llm_quest.recipes.tuning_config import Classify, Dpo, Reward, Sft
from llm_quest.report.words import aligned, duration, quantity
from llm_quest.techniques.checkpointing import checkpointing_off
from llm_quest.train.parallel import Parallel, pick_device

Say = Callable[[str], None]
Tuning = Sft | Reward | Dpo | Classify

LOOKED_AT = 8
"""So many steps tell how long rows are."""


@dataclass(frozen=True, kw_only=True)
class TuningPlan(Footprint):
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
        how = f"{STEPS} real steps timed" if self.measured else f"predicted at {REACHED:.0%} of the matrix-product peak"
        a_step = self.flops_per_token * self.tokens_per_step
        share = a_step / self.step_seconds / 1e9 / self.peak_gflops
        speed = f"{self.tokens_per_step / self.step_seconds:,.0f} tokens/s, {share:.0%} of the peak"
        work = (
            f"{self.steps:,} steps of {self.things_per_step:,} {self.things}, about {self.tokens_per_step:,.0f} tokens"
        )
        once = f"{self.once_flops:.3g} FLOPs, about {duration(self.once_seconds)}"
        facts = [
            ("model", f"{self.model}, {self.parameters:,} parameters, {self.learned:,} of them trained"),
            ("work", f"{work} ({quantity(round(self.steps * self.tokens_per_step))} in all, {self.epochs:.3g} epochs)"),
            (
                "FLOPs",
                f"{self.flops_per_token / 1e6:,.4g} M a token, {a_step / 1e9:,.4g} G a step, {self.flops:.3g} in all",
            ),
            *([("before: the reference", once)] if self.once_flops else []),
            *self.needs(),
            ("a step", f"{self.step_seconds:.3g} s, {speed} ({how})"),
            ("the run", duration(self.seconds)),
        ]
        return aligned(facts) + self.warned("fewer rows at once (batch.micro_rows), or techniques=[checkpointing]")


def plan_tuning(config: Tuning, *, measure: bool, say: Say) -> TuningPlan:
    """The cost of a recipe on this machine. measure: time real steps."""
    device = pick_device(config.device)
    job = ASSEMBLED[type(config)](config, say)
    model, bf16 = job.model.to(device).train(), precision(config.precision, device).value == "bf16"
    largest, tokens = looked_at(job, config.steps)
    batch = largest.to(device)
    cost = counted_whole(config, job, batch, device, bf16)
    each, rows = cost.flops / largest.num_tokens, config.batch.rows
    once = once_flops(config, job, cost.forward / largest.num_tokens * tokens / rows)
    if measure:
        say(f"timing {STEPS} real steps on {largest.num_tokens:,} tokens")
    stepper, memory = optimizer(config.optimizer, model), memory_by_kind(config, job, cost)
    machine = footprint(memory, keep=config.checkpoint.keep, bf16=bf16, device=device)
    rate = REACHED * machine["peak_gflops"] * 1e9
    step = each * tokens / rate
    if measure:
        took = timed(job.objective, stepper, batch, device, bf16)
        step, rate = took.of(tokens / largest.num_tokens), cost.forward / forward_seconds(job, batch, device, bf16)
    return TuningPlan(
        model=page_of(model.config).name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        learned=memory["gradients"] // MASTER,
        things=THINGS[type(config)],
        things_per_step=rows,
        tokens_per_step=tokens,
        steps=config.steps,
        epochs=config.steps * rows / len(feed_of(job).source),
        flops_per_token=each,
        flops=each * tokens * config.steps + once,
        once_flops=once,
        measured=measure,
        step_seconds=step,
        once_seconds=once / rate,
        seconds=step * config.steps + once / rate,
        **machine,
    )


def looked_at(job: Job, steps: int) -> tuple[Any, float]:
    """The largest micro-batch of the first steps, and how many tokens a step has."""
    some = [job.feed.at(step) for step in range(min(LOOKED_AT, steps))]
    batches: list[Any] = [batch for step in some for batch in step]
    largest = max(batches, key=lambda batch: batch.num_tokens)
    if isinstance(largest, AnswerBatch):  # what the reference thinks of it makes no difference to the cost
        largest = replace(largest, reference=torch.zeros(len(largest.tokens)))
    return largest, sum(batch.num_tokens for batch in batches) / len(some)


def counted_whole(config: Tuning, job: Job, batch: Any, device: torch.device, bf16: bool) -> Cost:
    """One micro-batch. A checkpointed model keeps what it keeps, and the largest block in full on the way back."""
    cost = counted(job.objective, batch, device, bf16)
    if without_checkpointing(config.techniques, False)[1]:
        with checkpointing_off(job.model):
            largest = counted(job.objective, batch, device, bf16).largest
        cost = replace(cost, kept=cost.kept + largest)
    return cost


@torch.no_grad()
def forward_seconds(job: Job, batch: Any, device: torch.device, bf16: bool) -> float:
    """Of a pass that nothing is learned from; the least of three."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return min(clocked(lambda: job.objective(batch), device) for _ in range(STEPS))


def once_flops(config: Tuning, job: Job, a_pair: float) -> float:
    """Of the reference's log-probabilities: of held-out pairs always, of all where no model computes them on the way.
    a_pair: of the objective's forward pass, which is two where one does."""
    if not isinstance(config, Dpo):
        return 0.0
    if job.objective.reference is not None:
        return a_pair / 2 * float(job.facts["held_out_rows"])
    return a_pair * float(job.facts["held_out_rows"] + job.facts["train_rows"])


def memory_by_kind(config: Tuning, job: Job, cost: Cost) -> dict[str, int]:
    memory = {**of_parameters(job.model, config.optimizer.name), "activations": cost.kept}
    memory |= teacher_bytes(next((one for one in job.objective.modules() if isinstance(one, Distillation)), None))
    return memory | ({"reference": memory["weights"]} if isinstance(job.feed, Moving) else {})


def feed_of(job: Job) -> Any:
    """The feed of rows, where a moving reference stands before it."""
    return job.feed.feed if isinstance(job.feed, Moving) else job.feed


ASSEMBLED: dict[type, Callable[[Any, Say], Job]] = {
    Sft: lambda config, say: sft.assembled(config, Parallel(), say),
    Reward: lambda config, say: reward.assembled(config, Parallel(), say),
    Dpo: lambda config, say: dpo.assembled(config, Path(), Parallel(), say),
    Classify: lambda config, say: classify.assembled(config, Parallel(), say),
}
THINGS = {Sft: "rows", Reward: "pairs", Dpo: "pairs", Classify: "texts"}
