"""What every recipe that learns from its own samples assembles alike: who writes, who scores, what is learned.

The reference of a KL term is the model as it began: a frozen copy, or with LoRA the same memory with the adapters
off."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from llm_quest.contracts import Callback
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.attention_divergence import looks_of
from llm_quest.objectives.log_probs import token_log_probs
from llm_quest.objectives.policy_gradient import PolicyGradient
from llm_quest.objectives.surrogates import VARIANTS
from llm_quest.recipes.choices import precision
from llm_quest.recipes.course import company, founded
from llm_quest.recipes.policy_config import Policy
from llm_quest.recipes.tuning import edited, may_share
from llm_quest.rollouts.advantages import ESTIMATORS
from llm_quest.rollouts.rollouts import Ask, Plan, Rollouts, Scorer, Seen
from llm_quest.rollouts.scoring import Judge, Scoring, Steps
from llm_quest.rollouts.writer import Writer
from llm_quest.techniques.lora import adapters_off, is_adapter
from llm_quest.techniques.taps import Taps
from llm_quest.train.parallel import Parallel
from llm_quest.train.state import derive_seed
from llm_quest.train.step import autocast

Say = Callable[[str], None]
Settings = TypeVar("Settings", bound=Policy)


def decided(config: Settings, parallel: Parallel) -> Settings:
    """The config with what `auto` means here written out."""
    chosen = precision(config.precision, parallel.device)
    if config.precision == "auto" and config.variant.startswith("gspo"):
        chosen = replace(chosen, value="fp32")  # its clip range is finer than bfloat16's rounding
    return config.model_copy(update={"precision": chosen.value, "compile": config.compile is True})


@contextmanager
def entered(config: Settings, out: Path, say: Say) -> Iterator[tuple[Settings, Parallel, Say]]:
    """The processes of a run that writes into its folder before it begins, the config with what `auto` means here, and
    who speaks: the leader alone."""
    with company(config, config.rollout.prompts) as parallel:
        config = decided(config, parallel)
        founded(config, out, parallel)
        yield config, parallel, say if parallel.leader else lambda line: None


@dataclass(frozen=True)
class Learner:
    """What is optimised, on which rows, and the techniques that ride along."""

    objective: PolicyGradient
    feed: Rollouts
    riding: list[Callback]


def learner(
    config: Policy,
    model: Decoder,
    tokenizer: Tokenizer,
    ask: Ask,
    judges: Sequence[Judge],
    parallel: Parallel,
    say: Say,
    *,
    separately: bool = False,
    steps: Steps | None = None,
    seen: Seen | None = None,
    read_all: bool = False,
) -> Learner:
    """From a model that stands on its device. judges, separately, steps: see `Scoring`. read_all: see `Rollouts`; an
    entropy bonus wants it in any case."""
    first = copy.deepcopy(model).requires_grad_(False) if config.kl is not None else None
    adapted_before = any(map(is_adapter, model.card.techniques))
    riding = edited(config, model, say)
    light = any(map(is_adapter, model.card.techniques)) and not adapted_before
    reference = None if first is None else scorer(model, config, off=True) if light else scorer(first, config)
    scoring = Scoring(
        judges=tuple(judges),
        estimator=ESTIMATORS[config.advantages or VARIANTS[config.variant].advantages],
        separately=separately,
        budget=config.rollout.new_tokens,
        overlong=config.rollout.overlong,
        filter_truncated=config.rollout.filter_truncated,
        steps=steps,
        keep_flat=config.rollout.keep_flat is not False,
    )
    if config.attention:
        tapped(model)
    writer, plan = writer_of(config, model, tokenizer, parallel), plan_of(config)
    score = scorer(model, config) if plan.rescore else None
    look = looker(model) if config.attention else None
    feed = Rollouts(
        model, ask, writer, scoring, plan, reference=reference, score=score, look=look, seen=seen,
        share=parallel.share, gather=parallel.gather, read_all=read_all or config.entropy > 0,
    )  # fmt: skip
    return Learner(objective_of(config, model), feed, riding)


def objective_of(config: Policy, model: Decoder) -> PolicyGradient:
    return PolicyGradient(
        model,
        config.chosen_surrogate(),
        count=(count := config.count or VARIANTS[config.variant].count),
        horizon=config.rollout.new_tokens if count == "horizon" else None,
        temperature=config.rollout.temperature,
        kl=config.kl_term(),
        entropy=config.entropy,
        looking=config.attention,
        correction=config.sampler_correction(),
        stale=config.stale,
    )


def plan_of(config: Policy) -> Plan:
    """Prompts that are shared leave no whole rows of attention to learn."""
    part = config.rollout
    return Plan(
        prompts=part.prompts,
        group=part.group,
        updates=part.updates,
        minibatches=part.minibatches,
        draws=config.draws,
        micro_tokens=part.micro_tokens,
        share_prompts=may_share(config) and not config.attention,
        kl_in_reward=config.kl.beta if config.kl is not None and config.kl.place == "reward" else 0.0,
        rescore=config.correction is not None,
        seed=derive_seed(config.seed, "sampling"),
    )


def writer_of(config: Policy, model: Decoder, tokenizer: Tokenizer, parallel: Parallel) -> Writer:
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


def tapped(model: Decoder) -> None:
    """One tap, on the last layer, whose attention is learned."""
    try:
        Taps((-1,))(model)
    except ValueError as error:
        raise UsageError(f"attention cannot be learned on this model: {error}") from None


def looker(model: Decoder) -> Scorer:
    return lambda batch: looks_of(model, batch.tokens)


def scorer(model: Decoder, config: Policy, *, off: bool = False) -> Scorer:
    """Scores a batch at the temperature it was sampled at. off: with the adapters off."""

    def score(batch: Any) -> torch.Tensor:
        with adapters_off(model) if off else nullcontext():
            return token_log_probs(model, batch, config.rollout.temperature)

    return score
