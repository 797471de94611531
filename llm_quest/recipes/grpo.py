"""`quest train grpo`: a model, problems that can be checked -> a model that solves more of them.

      questions -> samples -> rewards -> advantages -> policy gradient, with held-out accuracy before, during and after

The reference of a KL term is the model as it began: a frozen copy, or with LoRA the same memory with the adapters off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_quest.contracts import Probe, Reward
from llm_quest.data.chat import Chat
from llm_quest.data.problems import Drawn, Problem, draw, spelled
from llm_quest.data.problems.gsm8k import held_out, read_gsm8k
from llm_quest.data.problems.problem import chance
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.disk import replace_text
from llm_quest.errors import UsageError
from llm_quest.hub.files import load, load_tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.log_probs import token_log_probs
from llm_quest.objectives.policy_gradient import PolicyGradient
from llm_quest.objectives.reward_model import scores
from llm_quest.objectives.surrogates import VARIANTS
from llm_quest.recipes import seeds
from llm_quest.recipes.choices import precision
from llm_quest.recipes.config import as_yaml
from llm_quest.recipes.course import Outcome, company, require_same_run
from llm_quest.recipes.grpo_config import Grpo, Named
from llm_quest.recipes.policy_probes import Extremes, HeldOut
from llm_quest.recipes.tuning import Job, Say, carried_out, edited, opened
from llm_quest.recipes.tuning_config import Start
from llm_quest.recipes.warmup import warmed
from llm_quest.recipes.yaml import Settings
from llm_quest.rollouts.advantages import ESTIMATORS
from llm_quest.rollouts.doctor import Doctor
from llm_quest.rollouts.rewards import Correct, FormatOnly, RandomReward
from llm_quest.rollouts.rollouts import Plan, Rollouts, Scorer
from llm_quest.rollouts.scored import Scored
from llm_quest.rollouts.scoring import Judge, Scoring
from llm_quest.rollouts.steps import step_rewards
from llm_quest.rollouts.writer import Question, Writer
from llm_quest.techniques.lora import adapters_off, is_adapter
from llm_quest.techniques.score_head import score_head
from llm_quest.train.parallel import Parallel
from llm_quest.train.run import Run
from llm_quest.train.step import autocast

Encode = Callable[[str], list[int]]


def train_grpo(
    config: Grpo, settings: Settings, out: Path, *, resume: str = "auto", env: Mapping[str, Any] | None = None,
    quiet: bool = False, say: Say = print,
) -> Outcome:  # fmt: skip
    """Run the recipe in a folder."""
    with company(config, config.rollout.prompts) as parallel:
        if parallel.world > 1:
            raise UsageError("grpo runs in one process: a rollout is sampled where it is learned from; drop torchrun")
        chosen = precision(config.precision, parallel.device)
        if config.precision == "auto" and config.variant.startswith("gspo"):
            chosen = replace(chosen, value="fp32")  # its clip range is finer than bfloat16's rounding
        config = config.model_copy(update={"precision": chosen.value, "compile": config.compile is True})
        require_same_run(config, out)
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / "config.yaml", as_yaml(config))
        made = assembled(config, settings, out, parallel, say)
        before = made.held.accuracy(made.job.model)
        say(f"held out, before: accuracy {before.greedy}")
        outcome = carried_out(made.job, config, out, resume, env or {}, quiet, say, parallel)
        if outcome.status == "finished":
            say(f"held out, after:  accuracy {made.held.accuracy(made.job.model.eval()).greedy}")
        return outcome


@dataclass(frozen=True)
class Made:
    """The recipe's job, and the eye it keeps on held-out problems."""

    job: Job
    held: HeldOut


def assembled(config: Grpo, settings: Settings, out: Path, parallel: Parallel, say: Say) -> Made:
    """Model, problems, rollouts, objective."""
    problems = posed(config)
    model, tokenizer = begun(config, settings, out, parallel, say)
    model.to(parallel.device)
    encode = asking(config, tokenizer)
    first = copy.deepcopy(model).requires_grad_(False) if config.kl is not None else None
    adapted_before = any(map(is_adapter, model.card.techniques))
    riding = edited(config, model, say)
    objective = PolicyGradient(
        model,
        config.chosen_surrogate(),
        count=(count := config.count or VARIANTS[config.variant].count),
        horizon=config.rollout.new_tokens if count == "horizon" else None,
        temperature=config.rollout.temperature,
        kl=config.kl_term(),
        entropy=config.entropy,
        correction=config.sampler_correction(),
        stale=config.stale,
    )
    light = any(map(is_adapter, model.card.techniques)) and not adapted_before
    reference = None if first is None else scorer(model, config, off=True) if light else scorer(first, config)
    feed = rollouts(config, model, tokenizer, encode, problems, reference, parallel)
    held = HeldOut(
        problems.held_out, tokenizer, encode, config.evaluate.every, config.rollout.new_tokens,
        config.evaluate.samples, config.rollout.temperature, seeds.stream(config.seed, "evaluation"),
    )  # fmt: skip

    def probes(run: Run) -> Sequence[Probe]:
        held.folder = run.samples if run.leader else None
        return [held, Extremes(objective, config.log_every)]

    facts = {"task": config.task, "held_out_problems": len(problems.held_out), "tokenizer_sha256": tokenizer.hash}
    job = Job(
        objective, feed, probes, tokenizer, facts, {"task": problems.identity}, riding,
        watchers=[Doctor(config.patience)],
    )  # fmt: skip
    return Made(job, held)


@dataclass(frozen=True)
class Posed:
    """Problem number i of an endless list to learn from, and those that are held out."""

    train: Callable[[int], Problem]
    held_out: list[Problem]
    identity: str


def posed(config: Grpo) -> Posed:
    """A task's own splits, or a GSM8K file: its training part in a new order every epoch, a part of it held out."""
    seed, number = seeds.stream(config.seed, "order"), config.evaluate.problems
    if not config.task.endswith(".jsonl"):
        task = spelled(config.task)
        return Posed(partial(Drawn(task), seed), [draw(task, "validation", i, seed) for i in range(number)], repr(task))
    learned, held = held_out(read_gsm8k(config.task))
    if not learned or not held:
        raise UsageError(f"{config.task} holds too few problems to keep some of them out of training")
    return Posed(partial(in_turn, learned, seed), held[:number], f"{config.task}: {len(learned)}")


def in_turn(problems: Sequence[Problem], seed: int, index: int) -> Problem:
    """Every problem once per epoch, in an order of its own."""
    epoch, place = divmod(index, len(problems))
    order = list(range(len(problems)))
    chance("order", seed, epoch).shuffle(order)
    return problems[order[place]]


def begun(config: Grpo, settings: Settings, out: Path, parallel: Parallel, say: Say) -> tuple[Decoder, Tokenizer]:
    """The model that is loaded, or a fresh one that has been warmed up."""
    if config.model.load is not None:
        return opened(Start(load=config.model.load))
    if config.task.endswith(".jsonl"):
        raise UsageError("a fresh model cannot be warmed up on GSM8K; give model.load=FOLDER")
    assert config.warmup is not None
    return warmed(config, config.warmup, settings, spelled(config.task), out / "warmup", parallel, say)


def asking(config: Grpo, tokenizer: Tokenizer) -> Encode:
    """From a problem's prompt to ids: as plain text after the start token, or through the chat template."""
    if not config.chat:
        return lambda text: [tokenizer.start_id, *tokenizer.encode(text, template=False)]
    chat = Chat(tokenizer)
    return lambda text: chat.prompt([{"role": "user", "content": text}])


def rollouts(
    config: Grpo, model: Decoder, tokenizer: Tokenizer, encode: Encode, problems: Posed, reference: Scorer | None,
    parallel: Parallel,
) -> Rollouts:  # fmt: skip
    """The feed."""
    part = config.rollout
    writer = writer_of(config, model, tokenizer, parallel)
    scoring = Scoring(
        judges=tuple(
            Judge(one.name, rewarding(config, one, tokenizer, parallel), one.weight) for one in config.rewards
        ),
        estimator=ESTIMATORS[config.advantages or VARIANTS[config.variant].advantages],
        separately=config.separately,
        budget=part.new_tokens,
        overlong=part.overlong,
        filter_truncated=part.filter_truncated,
        steps=partial(step_rewards, tokenizer) if config.process else None,
        keep_flat=part.keep_flat,
    )
    plan = Plan(
        prompts=part.prompts,
        group=part.group,
        updates=part.updates,
        minibatches=part.minibatches,
        draws=config.draws,
        micro_tokens=part.micro_tokens,
        kl_in_reward=config.kl.beta if config.kl is not None and config.kl.place == "reward" else 0.0,
        rescore=config.correction is not None,
        seed=seeds.stream(config.seed, "sampling"),
    )

    def ask(index: int) -> Question:
        problem = problems.train(index)
        return Question(tuple(encode(problem.prompt)), problem)

    score = scorer(model, config) if plan.rescore else None
    return Rollouts(model, ask, writer, scoring, plan, reference=reference, score=score)


def writer_of(config: Grpo, model: Decoder, tokenizer: Tokenizer, parallel: Parallel) -> Writer:
    """Samples as they are scored: same temperature, same precision; ends at every end that the model knows."""
    own = model.generation.eos if model.generation is not None else ()
    return Writer(
        tokenizer=tokenizer,
        eos=tuple(sorted({*own, *tokenizer.eos_ids})),
        new_tokens=config.rollout.new_tokens,
        temperature=config.rollout.temperature,
        within=partial(autocast, precision(config.precision, parallel.device).value, parallel.device),
        at_once=config.rollout.at_once,
    )


def scorer(model: Decoder, config: Grpo, *, off: bool = False) -> Scorer:
    """Scores a batch at the temperature it was sampled at. off: with the adapters off."""

    def score(batch: Any) -> torch.Tensor:
        with adapters_off(model) if off else nullcontext():
            return token_log_probs(model, batch, config.rollout.temperature)

    return score


def rewarding(config: Grpo, one: Named, tokenizer: Tokenizer, parallel: Parallel) -> Reward:
    return judge_called(str(one.load), tokenizer, parallel) if one.name == "model" else REWARDS[one.name](config)


def judge_called(where: str, tokenizer: Tokenizer, parallel: Parallel) -> Reward:
    """A reward model that reads the policy's ids."""
    judge = load(where, dtype="float32").to(parallel.device)
    if score_head(judge) is None:
        raise UsageError(f"{where} is no reward model; train one (quest train reward)")
    if load_tokenizer(where).hash != tokenizer.hash:
        raise UsageError(f"{where} has another tokenizer than the policy: it would read other ids than were sampled")
    return Scored(partial(scores, judge))


REWARDS: dict[str, Callable[[Grpo], Reward]] = {
    "correct": lambda config: Correct(),
    "format": lambda config: FormatOnly(),
    "random": lambda config: RandomReward(seeds.stream(config.seed, "random reward")),
}
