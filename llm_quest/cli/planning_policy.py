"""What learning from one's own samples will cost before it starts: `quest plan grpo`. A policy's step is sampling,
scoring and training, and none of them can be told from the model alone, so a few real steps are done, with a coin's
rewards and with every row learned from, also where a group is flat: the most that a step costs. Nothing is written.

A fresh model is planned as it is drawn, without its warm-up: its answers are nearly as long as the budget allows, which
is the most again."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llm_quest.cli.counting import counted
from llm_quest.cli.planning import MASTER, Footprint, advance, clocked, footprint, of_parameters
from llm_quest.data.alphabet import character_tokenizer
from llm_quest.data.problems import spelled
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.models.build import page_of
from llm_quest.models.decoder import Decoder
from llm_quest.models.flops import cost_of
from llm_quest.recipes.course import optimizer
from llm_quest.recipes.grpo import asking, posed, question, rewarding
from llm_quest.recipes.grpo_config import Grpo
from llm_quest.recipes.policy import Learner, decided, learner
from llm_quest.recipes.tuning import opened
from llm_quest.recipes.tuning_config import Start
from llm_quest.recipes.warmup import newborn
from llm_quest.recipes.yaml import Settings
from llm_quest.report.words import aligned, duration
from llm_quest.rollouts.metered import Meter, Metered
from llm_quest.rollouts.rewards import RandomReward
from llm_quest.rollouts.scoring import Judge
from llm_quest.scope import Scope
from llm_quest.techniques.lora import is_adapter
from llm_quest.train.parallel import Parallel, pick_device
from llm_quest.train.state import derive_seed
from llm_quest.train.step import autocast

Say = Callable[[str], None]
ROLLOUTS = 2


@dataclass(frozen=True, kw_only=True)
class PolicyPlan(Footprint):
    """sampling, scoring, training: seconds of an optimiser step, measured; where a rollout serves several steps, its
    share. flops: of the run. length: tokens of an answer, on average. memory: bytes by kind, the cache while sampling
    and the activations while learning."""

    model: str
    parameters: int
    learned: int
    prompts: int
    group: int
    length: float
    steps: int
    flops: float
    sampling: float
    scoring: float
    training: float
    step_seconds: float
    seconds: float

    def lines(self) -> list[str]:
        a_step, split = self.flops / self.steps, f"sampling {self.sampling:.3g}, scoring {self.scoring:.3g}"
        share = f"{a_step / self.step_seconds / 1e9 / self.peak_gflops:.0%} of the peak"
        rollout = f"{self.prompts} prompts x {self.group} samples of {self.length:.3g} tokens"
        facts = [
            ("model", f"{self.model}, {self.parameters:,} parameters, {self.learned:,} of them trained"),
            ("work", f"{self.steps:,} steps; a rollout is {rollout}"),
            ("FLOPs", f"{a_step / 1e9:,.4g} G a step, {self.flops:.3g} in all"),
            *self.needs(),
            ("a step", f"{self.step_seconds:.3g} s: {split}, training {self.training:.3g}; {share}"),
            ("the run", f"{duration(self.seconds)}, without a warm-up and without looking at held-out problems"),
        ]
        return aligned(facts) + self.warned("fewer tokens at once (rollout.micro_tokens), or a smaller group")


def plan_policy(config: Grpo, settings: Settings, *, measure: bool, say: Say) -> PolicyPlan:
    """The cost of a recipe on this machine."""
    if not measure:
        raise UsageError("a policy's step is measured and not predicted: leave --no-measure out")
    device, parallel = pick_device(config.device), Parallel()
    config = decided(config, parallel)
    model, tokenizer = beginner(config, settings)
    made = learning(config, model.to(device), tokenizer, parallel, say)
    meter = Meter(cost_of(model), scorings=(config.kl is not None) + (config.correction is not None))
    made.feed.seen = meter.sampled
    say(f"timing {ROLLOUTS} real rollouts, and the steps that learn from them")
    times, largest, length = timed(config, made, Metered(made.feed, meter), device)
    bf16, step = config.precision == "bf16", sum(times)
    memory = memory_by_kind(config, made, counted(made.objective, largest.to(device), device, bf16).kept)
    return PolicyPlan(
        model=page_of(model.config).name,
        parameters=memory["weights"] // MASTER,
        learned=memory["gradients"] // MASTER,
        prompts=config.rollout.prompts,
        group=config.rollout.group,
        length=length,
        steps=config.steps,
        flops=meter.flops / (1 + ROLLOUTS) / made.feed.plan.steps * config.steps,
        sampling=times[0],
        scoring=times[1],
        training=times[2],
        step_seconds=step,
        seconds=step * config.steps,
        **footprint(memory, keep=config.checkpoint.keep, bf16=bf16, device=device),
    )


def beginner(config: Grpo, settings: Settings) -> tuple[Decoder, Tokenizer]:
    """The model that the run begins with, or, fresh, one that has not been warmed up."""
    if config.model.load is not None:
        return opened(Start(load=config.model.load))
    tokenizer = character_tokenizer(spelled(config.task).alphabet)
    return newborn(config.model, settings, tokenizer, config.seed), tokenizer


def learning(config: Grpo, model: Decoder, tokenizer: Tokenizer, parallel: Parallel, say: Say) -> Learner:
    """Rollouts whose first reward is a coin's, all of whose rows are learned from; reward models are asked as they
    will be."""
    judges = [Judge("random", RandomReward(derive_seed(config.seed, "random reward")))]
    asked = [one for one in config.rewards if one.name == "model"]
    judges += [Judge(one.name, rewarding(config, one, tokenizer, parallel), one.weight) for one in asked]
    ask = partial(question, posed(config), asking(config, tokenizer))
    return learner(config, model, tokenizer, ask, judges, parallel, say, read_all=True)


def timed(
    config: Grpo, made: Learner, feed: Metered, device: torch.device
) -> tuple[tuple[float, float, float], Any, float]:
    """Seconds of an optimiser step by what is done in it (the rollouts after the first), the largest micro-batch, and
    how long answers are. The update has rate 0."""
    model, plan, found = made.objective.model, made.feed.plan, list[tuple[float, float, float]]()
    stepper = optimizer(config.optimizer.model_copy(update={"lr": 0.0, "weight_decay": 0.0}), model)
    batches: list[Any] = []

    def learn() -> None:
        for batch in batches:
            with autocast(config.precision, device):
                loss = made.objective(batch.to(device))
            (loss.total / loss.count).backward()
        advance(model, stepper)

    largest, length = None, 0.0
    for number in range(1 + ROLLOUTS):
        training = 0.0
        for step in range(number * plan.steps, (number + 1) * plan.steps):
            batches[:] = feed.at(step)
            training += clocked(learn, device)
            largest = max([*batches, *([largest] if largest else [])], key=lambda batch: batch.num_tokens)
        rollout = made.feed.rollout
        assert rollout is not None
        seconds = [rollout.notes[name][0] for name in ("seconds_sampling", "seconds_scoring")]
        found.append((seconds[0] / plan.steps, seconds[1] / plan.steps, training / plan.steps))
        length = rollout.notes["length"][0] / rollout.notes["length"][1]
    sampling, scoring, train = (statistics.mean(column) for column in zip(*found[1:], strict=True))
    return (sampling, scoring, train), largest, length


def memory_by_kind(config: Grpo, made: Learner, kept: int) -> dict[str, int]:
    model, rollout = made.objective.model, made.feed.rollout
    longest = max((len(row.prompt) for row in rollout.rows), default=0) if rollout is not None else 0
    capacity = longest + config.rollout.new_tokens
    rows = config.rollout.at_once or config.rollout.prompts * config.rollout.group
    memory = {
        **of_parameters(model, config.optimizer.name),
        "activations": kept,
        "cache": rows * row_of_cache(config, model, capacity),
    }
    own = config.kl is not None and not any(map(is_adapter, model.card.techniques))
    return memory | ({"reference": memory["weights"]} if own else {})


@torch.no_grad()
def row_of_cache(config: Grpo, model: Decoder, capacity: int) -> int:
    """Bytes for one row, after filing a token."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    cache = model.new_cache(1, capacity)
    with autocast(config.precision, token.device):
        model(token, Scope.plain(token, cache=cache))
    return int(cache.nbytes())
