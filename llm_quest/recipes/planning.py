"""Plans of assembled jobs (`quest plan`): the workload of a job for `cost.plan`, and the measured plan of a policy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_quest.contracts import LogFn
from llm_quest.cost.flops import ModelCost
from llm_quest.cost.plan import Plan, Workload, count_step, describe_machine, estimate_checkpoint_bytes, plan
from llm_quest.cost.profile import bf16_autocast, freeze_values, time_call
from llm_quest.data.batch import TokenBatch
from llm_quest.data.loader import ShardedLoader
from llm_quest.data.preference_pairs import PreferenceBatch
from llm_quest.errors import UsageError
from llm_quest.layers.initialize import materialize
from llm_quest.models.build import build, build_meta_model, family_of
from llm_quest.objectives.distillation import DistillationLoss
from llm_quest.objectives.kto import KTOLoss
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.objectives.preference import PreferenceLoss
from llm_quest.recipes.assembly import apply_techniques, fit_sequence_length, micro_batch_rows
from llm_quest.recipes.auto import resolve_auto
from llm_quest.recipes.auxiliary_losses import build_distillation
from llm_quest.recipes.config_schema import RunConfig
from llm_quest.recipes.engine import build_optimizer, init_distributed
from llm_quest.recipes.freezing import freeze_parameters
from llm_quest.recipes.kto import KTOLoader
from llm_quest.recipes.pretrain import PretrainConfig, resolve_model_config, resolve_vocab_size
from llm_quest.recipes.recipe import Context, Job, Recipe
from llm_quest.recipes.reference_model import SyncedReference
from llm_quest.recipes.rpt.recipe import FlopsMeter, MeteredRolloutLoader
from llm_quest.recipes.technique_entry import known_techniques
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.rollouts.advantages import WeightedReward
from llm_quest.rollouts.model_reward import ModelReward
from llm_quest.rollouts.rewards import RandomReward
from llm_quest.techniques.lora import ADAPTERS
from llm_quest.train.rng_state import derive_seed

SAMPLED_STEPS = 8
"""Steps from which the lengths of rows are sampled."""
TIMED_ROLLOUTS = 2


@contextmanager
def open_job(recipe: Recipe, config: RunConfig, settings: RawConfig, log: LogFn, folder: Path) -> Iterator[Job]:
    """Assemble a job on this process alone, to look at its batches. folder: an empty one to use."""
    with init_distributed(config, 1) as parallel:
        yield build_job(recipe, config, Context(folder, parallel, log, settings, planning=True))


def build_job(recipe: Recipe, config: RunConfig, context: Context) -> Job:
    """Build a job whose model has the frozen parameters of a run."""
    job = recipe.build(config, context)
    if config.freeze:
        freeze_parameters(job.model, config.freeze, context.log)
    return job


def plan_recipe(recipe: Recipe, config: Any, settings: RawConfig, folder: Path, *, measure: bool, log: LogFn) -> Plan:
    """The cost of a run of this recipe on this machine, counted with the recipe's number of threads. folder: an empty
    one that it may use."""
    with init_distributed(config, 1) as parallel:
        context = Context(folder, parallel, log, settings, planning=True)
        if recipe.name in WITHOUT_DATA:
            return WITHOUT_DATA[recipe.name](config, context, measure=measure)
        job = build_job(recipe, config, context)
        plan_it = plan_policy if isinstance(job.objective, PolicyGradientLoss) else plan_job
        return plan_it(job, context, measure=measure)


def plan_pretrain(config: PretrainConfig, context: Context, *, measure: bool) -> Plan:
    """The cost of pretraining, without preparing its data and without memory for its model."""
    parallel, log = context.parallel, context.log
    numbers, vocab = resolve_model_config(config, context.settings), resolve_vocab_size(config)
    config = fit_sequence_length(config, context.settings, numbers.max_position_embeddings, log)
    config = resolve_auto(config, context)
    terms, frozen = list[DistillationLoss](), dict[str, nn.Module]()
    if config.teacher is not None:
        device = parallel.device
        terms = [build_distillation(config.teacher, config, ids=vocab, vocab=numbers.vocab_size, device=device)]
        frozen["teacher"] = terms[0].teacher.model

    def make_objective(filled: bool) -> NextTokenLoss:
        model = build(numbers) if filled else materialize(build_meta_model(numbers), "cpu", torch.float32)
        apply_techniques(config.all_techniques, model, lambda text: None)
        return config.auxiliary_losses.resolve(model).build_objective(model, terms)

    length, world = config.sequence_length, parallel.world_size
    rows = micro_batch_rows(config, parallel, length)
    tokens = config.batch_size * length
    workload = Workload(
        family=family_of(numbers).name, make_objective=make_objective,
        make_optimizer=lambda model: build_optimizer(config, model),
        batch=random_packed_batch(rows, length, vocab), batch_units=rows * length,
        unit="token", units_per_step=tokens, step_work=f"{tokens:,} tokens", steps=config.max_steps,
        bf16=config.precision == "bf16", device=parallel.device, save_total_limit=config.save_total_limit,
        world_size=world, strategy=config.parallel, frozen=frozen,
        remedies=memory_remedies(config, rows),
    )  # fmt: skip
    return plan(workload, measure=measure, log=log)


WITHOUT_DATA = {"pretrain": plan_pretrain}
"""Recipes whose cost is known before their data is prepared."""


def random_packed_batch(rows: int, length: int, vocab_size: int) -> TokenBatch:
    """Random tokens, packed as a loader packs documents: two in a row."""
    tokens = torch.randint(0, vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    place, half = torch.arange(length), length // 2
    positions = torch.where(place < half, place, place - half).expand(rows, -1)
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], positions, (place >= half).long().expand(rows, -1))


def plan_job(job: Job, context: Context, *, measure: bool) -> Plan:
    """The cost of a job whose loader reads data: its largest micro-batch counted, and timed where it fits."""
    return plan(job_workload(job, context), measure=measure, log=context.log)


def job_workload(job: Job, context: Context) -> Workload:
    """The workload of a job. Rows differ in length, so a step counts the mean tokens of the first SAMPLED_STEPS
    steps."""
    config: Any = job.config
    steps = [job.loader.batches(step) for step in range(min(SAMPLED_STEPS, config.max_steps))]
    count: Callable[[Any], int] = count_batch_tokens if job.preprocessor is None else count_batch_images
    largest: Any = max((batch for step in steps for batch in step), key=lambda batch: batch.num_tokens)
    world = context.parallel.world_size
    units = world * sum(count(batch) for step in steps for batch in step) / len(steps)
    rows = config.rows_per_step
    words = f"{rows:,} rows, about {units:,.0f} tokens" if job.preprocessor is None else f"{rows:,} images"
    inner: Any = job.loader.loader if isinstance(job.loader, SyncedReference | KTOLoader) else job.loader
    source = inner.source if isinstance(inner, ShardedLoader) and job.preprocessor is None else None
    epochs = config.max_steps * rows / len(source) if isinstance(source, Sized) else None  # drawn rows have no end
    return Workload(
        family=family_of(job.model.config).name,
        make_objective=lambda filled: job.objective,
        make_optimizer=lambda model: build_optimizer(config, model, job.adamw_parameters),
        batch=without_reference(largest), batch_units=count(largest),
        unit="token" if job.preprocessor is None else "image", units_per_step=units, step_work=words,
        steps=config.max_steps, epochs=epochs,
        bf16=config.precision == "bf16", device=context.parallel.device, save_total_limit=config.save_total_limit,
        world_size=world, strategy=config.parallel, frozen=frozen_models(job),
        forward_passes_first=reference_rows(job) * units / rows / count(largest),
        remedies=memory_remedies(config, len(largest.images if job.preprocessor else largest.input_ids)),
    )  # fmt: skip


def count_batch_tokens(batch: Any) -> int:
    return int(batch.num_tokens)


def count_batch_images(batch: Any) -> int:
    return len(batch.images)


def without_reference(batch: Any) -> Any:
    """The batch with log-probabilities of 0 for the reference: they do not change the cost."""
    if not isinstance(batch, PreferenceBatch):
        return batch
    return replace(batch, reference_log_probs=torch.zeros(len(batch.input_ids)))


def reference_rows(job: Job) -> float:
    """Rows that a reference scores before the first step, in forward passes of the objective (which are two passes
    where a model computes the reference at every step). Held-out pairs always, all where nothing else computes them."""
    if isinstance(job.objective, KTOLoss):  # each row with its own answer and with a mismatched one
        return 2.0 * (job.facts["held_out_rows"] + job.facts["train_rows"])
    if not isinstance(job.objective, PreferenceLoss):
        return 0.0
    if job.objective.reference is not None:
        return float(job.facts["held_out_rows"]) / 2
    return float(job.facts["held_out_rows"] + job.facts["train_rows"])


def frozen_models(job: Job) -> dict[str, nn.Module]:
    """Models that are held in memory and not trained."""
    teachers = [module.teacher.model for module in job.objective.modules() if isinstance(module, DistillationLoss)]
    frozen = {"teacher": teachers[0]} if teachers else {}
    return frozen | ({"reference": job.loader.model} if isinstance(job.loader, SyncedReference) else {})


def memory_remedies(config: Any, rows: int) -> tuple[str, ...]:
    """Keys that save memory, the cheapest first. rows: of a micro-batch."""
    fewer = (f"fewer rows at once (micro_batch_size below {rows})",) if rows > 1 else ()
    checkpointed = any(entry["name"] == "checkpointing" for entry in config.all_techniques)
    return fewer if checkpointed else (*fewer, "gradient_checkpointing=true")


def plan_policy(job: Job, context: Context, *, measure: bool) -> Plan:
    """The cost of learning from samples. Sampling, scoring and training cannot be derived from the model alone, so real
    rollouts are made and learned from, with random rewards and every row read, also where a group is uniform: the most
    that a step costs. A fresh model is planned without its warm-up: its answers are nearly as long as the budget
    allows, which is the most again."""
    if not measure:
        raise UsageError("quest plan measures a policy's step and does not predict it: leave --no-measure out")
    config: Any = job.config
    rollouts: Any = job.loader.rollout_loader if isinstance(job.loader, MeteredRolloutLoader) else job.loader
    reward_randomly(rollouts, config.seed)
    job.model.to(context.parallel.device)
    cost = ModelCost(job.model)
    meter = FlopsMeter(cost, num_scorings=(config.kl_coef > 0) + (config.sampler_correction is not None))
    context.log(f"timing {TIMED_ROLLOUTS} real rollouts, and the steps that learn from them")
    seconds, largest, length = time_rollouts(job, rollouts, meter)
    per_step = config.num_generations * config.prompts_per_rollout / rollouts.plan.steps_per_rollout
    workload = policy_workload(job, context, largest, per_step)
    counted, memory, (parameters, trainable) = count_step(workload)
    prompt = max((len(row.prompt_ids) for row in rollouts.rollout.rows), default=0)
    rows = config.generation_batch_size or config.prompts_per_rollout * config.num_generations
    memory["cache"] = rows * cost.count_cache_bytes(prompt + config.max_new_tokens, bf16=workload.bf16)
    sampling, scoring, training = seconds
    return Plan(
        model=workload.family, parameters=parameters, trainable=trainable,
        unit="sample", units_per_step=per_step, step_work=workload.step_work, steps=config.max_steps,
        flops=meter.flops / (1 + TIMED_ROLLOUTS) / rollouts.plan.steps_per_rollout * config.max_steps,
        memory=memory, **estimate_checkpoint_bytes(parameters, counted.optimizer, config.save_total_limit),
        **describe_machine(workload.device, workload.bf16),
        measured=True, step_seconds=sum(seconds), remedies=workload.remedies,
        how=f"sampling {sampling:.3g} s, scoring {scoring:.3g} s, training {training:.3g} s, no evaluation",
        details={"sampling": sampling, "scoring": scoring, "training": training, "completion_length": length},
    )  # fmt: skip


def reward_randomly(rollouts: Any, seed: int) -> None:
    """Replace the rewards by a random one and the reward models, and train on every row."""
    random = WeightedReward("random", RandomReward(derive_seed(seed, "random reward")))
    models = [reward for reward in rollouts.reward_pipeline.rewards if isinstance(reward.reward_fn, ModelReward)]
    rollouts.reward_pipeline = replace(rollouts.reward_pipeline, rewards=(random, *models))
    rollouts.read_all = True


def policy_workload(job: Job, context: Context, largest: Any, samples: float) -> Workload:
    """The largest micro-batch of a policy's step."""
    config: Any = job.config
    adapted_here = any(known_techniques()[entry["name"]] in ADAPTERS for entry in config.techniques)
    own = config.kl_coef > 0 and not adapted_here
    group = f"{config.prompts_per_rollout} prompts x {config.num_generations} samples a rollout"
    return Workload(
        family=family_of(job.model.config).name,
        make_objective=lambda filled: job.objective,
        make_optimizer=lambda model: build_optimizer(config, model, job.adamw_parameters),
        batch=largest, batch_units=len(largest.input_ids), unit="sample", units_per_step=samples,
        step_work=f"{samples:,.3g} samples, {group}", steps=config.max_steps,
        bf16=config.precision == "bf16", device=context.parallel.device, save_total_limit=config.save_total_limit,
        frozen={"reference": job.model} if own else {},
        remedies=("fewer tokens at once (micro_batch_tokens)", "a smaller group (num_generations)"),
    )  # fmt: skip


def time_rollouts(job: Job, rollouts: Any, meter: FlopsMeter) -> tuple[tuple[float, float, float], Any, float]:
    """Seconds of sampling, scoring and training in an optimizer step (rollouts after the first); the largest
    micro-batch; tokens of a completion. The updates change nothing."""
    config: Any = job.config
    device, per_rollout = next(job.model.parameters()).device, rollouts.plan.steps_per_rollout
    optimizer = build_optimizer(config, job.model, job.adamw_parameters)
    freeze_values(optimizer)
    timings: list[tuple[float, ...]] = []
    largest, metrics = None, {}
    for number in range(1 + TIMED_ROLLOUTS):
        training = 0.0
        for step in range(number * per_rollout, (number + 1) * per_rollout):
            batches = rollouts.batches(step)
            meter.count_training(rollouts.rows_to_read(rollouts.minibatch(step % per_rollout)))
            training += time_call(partial(optimizer_step, job.objective, optimizer, batches, config.precision), device)
            largest = max([*batches, *([largest] if largest else [])], key=lambda batch: batch.num_tokens)
        meter.count_sampling(rollouts.rollout.groups)
        metrics = rollouts.rollout.metric_sums
        seconds = (metrics["sampling_seconds"][0], metrics["scoring_seconds"][0], training)
        timings.append(tuple(one / per_rollout for one in seconds))
    sampling, scoring, learning = (statistics.mean(column) for column in zip(*timings[1:], strict=True))
    tokens, samples = metrics["completions/mean_length"]
    return (sampling, scoring, learning), largest, tokens / samples


def optimizer_step(objective: Any, optimizer: torch.optim.Optimizer, batches: list[Any], precision: str) -> None:
    """An optimizer step over micro-batches."""
    device = next(objective.parameters()).device
    for batch in batches:
        with bf16_autocast(device, precision == "bf16"):
            loss = objective(batch.to(device))
        (loss.total / loss.count).backward()
    torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
