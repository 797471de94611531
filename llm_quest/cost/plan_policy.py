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

from llm_quest.cost.flops import ModelCost
from llm_quest.cost.plan import (
    BYTES_PER_PARAMETER,
    ResourceEstimate,
    estimate_resources,
    parameter_memory,
    step_optimizer,
    time_call,
)
from llm_quest.cost.profile import profile_step
from llm_quest.data.char_tokenizer import character_tokenizer
from llm_quest.data.problems import parse_task
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.formatting import align_columns, format_duration
from llm_quest.models.build import family_of
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.finetuning import StartModelConfig, load_for_finetuning
from llm_quest.recipes.grpo import REWARDS, GrpoConfig, load_problems, make_prompt, prompt_encoder
from llm_quest.recipes.policy_setup import PolicySetup, build_policy_setup, resolve_policy_config
from llm_quest.recipes.rpt.recipe import FlopsMeter, MeteredRolloutLoader
from llm_quest.recipes.run import build_optimizer
from llm_quest.recipes.sft_warmup import init_model
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.rollouts.reward_pipeline import WeightedReward
from llm_quest.rollouts.rewards import RandomReward
from llm_quest.scope import Scope
from llm_quest.techniques.lora import is_adapter
from llm_quest.train.parallel import DistributedContext, resolve_device
from llm_quest.train.state_dict import derive_seed
from llm_quest.train.step import autocast

LogFn = Callable[[str], None]
TIMED_ROLLOUTS = 2


@dataclass(frozen=True, kw_only=True)
class PolicyPlan(ResourceEstimate):
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
            *self.resource_rows(),
            ("a step", f"{self.step_seconds:.3g} s: {split}, training {self.training:.3g}; {share}"),
            ("the run", f"{format_duration(self.seconds)}, without a warm-up and without looking at held-out problems"),
        ]
        return align_columns(facts) + self.memory_warning(
            "fewer tokens at once (micro_batch_tokens), or a smaller group"
        )


def plan_policy(config: GrpoConfig, settings: RawConfig, *, measure: bool, log: LogFn) -> PolicyPlan:
    """The cost of a recipe on this machine."""
    if not measure:
        raise UsageError("a policy's step is measured and not predicted: leave --no-measure out")
    device, parallel = resolve_device(config.device), DistributedContext()
    config = resolve_policy_config(config, parallel, log)
    model, tokenizer = init_plan_policy(config, settings)
    policy = build_plan_rollouts(config, model.to(device), tokenizer, parallel, log)
    meter = FlopsMeter(ModelCost(model), num_scorings=(config.kl_coef > 0) + (config.sampler_correction is not None))
    log(f"timing {TIMED_ROLLOUTS} real rollouts, and the steps that learn from them")
    times, largest, length = time_policy_steps(config, policy, MeteredRolloutLoader(policy.rollouts, meter), device)
    bf16, step = config.precision == "bf16", sum(times)
    memory = estimate_policy_memory(
        config, policy, profile_step(policy.objective, largest.to(device), device, bf16).saved_bytes
    )
    return PolicyPlan(
        model=family_of(model.config).name,
        parameters=memory["weights"] // BYTES_PER_PARAMETER,
        learned=memory["gradients"] // BYTES_PER_PARAMETER,
        prompts=config.prompts_per_rollout,
        group=config.num_generations,
        length=length,
        steps=config.max_steps,
        flops=meter.flops / (1 + TIMED_ROLLOUTS) / policy.rollouts.plan.steps_per_rollout * config.max_steps,
        sampling=times[0],
        scoring=times[1],
        training=times[2],
        step_seconds=step,
        seconds=step * config.max_steps,
        **estimate_resources(memory, save_total_limit=config.save_total_limit, bf16=bf16, device=device),
    )


def init_plan_policy(config: GrpoConfig, settings: RawConfig) -> tuple[Decoder, Tokenizer]:
    """The model that the run begins with, or, fresh, one that has not been warmed up."""
    if config.model.load is not None:
        return load_for_finetuning(StartModelConfig(load=config.model.load))
    tokenizer = character_tokenizer(parse_task(config.task).alphabet)
    return init_model(config.model, settings, tokenizer, config.seed), tokenizer


def build_plan_rollouts(
    config: GrpoConfig, model: Decoder, tokenizer: Tokenizer, parallel: DistributedContext, log: LogFn
) -> PolicySetup:
    """Rollouts whose first reward is a coin's, all of whose rows are learned from; reward models are asked as they
    will be."""
    judges = [WeightedReward("random", RandomReward(derive_seed(config.seed, "random reward")))]
    asked = [one for one in config.rewards if one.name == "model"]
    judges += [
        WeightedReward(one.name, REWARDS[one.name](config, one, tokenizer, parallel), one.weight) for one in asked
    ]
    ask = partial(make_prompt, load_problems(config), prompt_encoder(config, tokenizer))
    return build_policy_setup(config, model, tokenizer, ask, judges, parallel, log, read_all=True)


def time_policy_steps(
    config: GrpoConfig, policy: PolicySetup, loader: MeteredRolloutLoader, device: torch.device
) -> tuple[tuple[float, float, float], Any, float]:
    """Seconds of an optimiser step by what is done in it (the rollouts after the first), the largest micro-batch, and
    how long answers are. The update has rate 0."""
    model, plan, found = policy.objective.model, policy.rollouts.plan, list[tuple[float, float, float]]()
    torch_optimizer = build_optimizer(config.model_copy(update={"learning_rate": 0.0, "weight_decay": 0.0}), model)
    batches: list[Any] = []

    def learn() -> None:
        for batch in batches:
            with autocast(config.precision, device):
                loss = policy.objective(batch.to(device))
            (loss.total / loss.count).backward()
        step_optimizer(model, torch_optimizer)

    largest, length = None, 0.0
    for number in range(1 + TIMED_ROLLOUTS):
        training = 0.0
        for step in range(number * plan.steps_per_rollout, (number + 1) * plan.steps_per_rollout):
            batches[:] = loader.batches(step)
            training += time_call(learn, device)
            largest = max([*batches, *([largest] if largest else [])], key=lambda batch: batch.num_tokens)
        rollout = policy.rollouts.rollout
        assert rollout is not None
        seconds = [rollout.metric_sums[name][0] for name in ("sampling_seconds", "scoring_seconds")]
        found.append(
            (
                seconds[0] / plan.steps_per_rollout,
                seconds[1] / plan.steps_per_rollout,
                training / plan.steps_per_rollout,
            )
        )
        length = rollout.metric_sums["completions/mean_length"][0] / rollout.metric_sums["completions/mean_length"][1]
    sampling, scoring, train = (statistics.mean(column) for column in zip(*found[1:], strict=True))
    return (sampling, scoring, train), largest, length


def estimate_policy_memory(config: GrpoConfig, made: PolicySetup, kept: int) -> dict[str, int]:
    model, rollout = made.objective.model, made.rollouts.rollout
    longest = max((len(row.prompt_ids) for row in rollout.rows), default=0) if rollout is not None else 0
    capacity = longest + config.max_new_tokens
    rows = config.generation_batch_size or config.prompts_per_rollout * config.num_generations
    memory = {
        **parameter_memory(model, config.optim),
        "activations": kept,
        "cache": rows * cache_row_bytes(config, model, capacity),
    }
    own = config.kl_coef > 0 and not any(map(is_adapter, model.spec.techniques))
    return memory | ({"reference": memory["weights"]} if own else {})


@torch.no_grad()
def cache_row_bytes(config: GrpoConfig, model: Decoder, capacity: int) -> int:
    """Bytes for one row, after filing a token."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    cache = model.new_cache(1, capacity)
    with autocast(config.precision, token.device):
        model(token, Scope.unpadded(token, cache=cache))
    return int(cache.nbytes())
