"""`quest train dpo`: preferences -> a model that gives the better answer more probability than it had and the worse one
less, without a reward model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_quest.contracts import Callback, Feed
from llm_quest.data.chat import Chat
from llm_quest.data.pairs import AnswerBatch
from llm_quest.objectives.preference import PreferenceLoss, answer_log_probs
from llm_quest.recipes.choices import precision
from llm_quest.recipes.course import Outcome, company
from llm_quest.recipes.preferring import HeldPairs, feed_of, prepared
from llm_quest.recipes.reference import Moving, known
from llm_quest.recipes.tuning import (
    Job,
    Say,
    carried_out,
    edited,
    may_share,
    opened,
    remember_ends,
    require_room,
    template_of,
    told,
)
from llm_quest.recipes.tuning_config import Dpo
from llm_quest.recipes.yaml import Settings
from llm_quest.techniques.lora import adapters_off, require_adapters
from llm_quest.train.parallel import Parallel
from llm_quest.train.state import derive_seed


def train_dpo(
    config: Dpo, settings: Settings, out: Path, *, resume: str = "auto", env: Mapping[str, Any] | None = None,
    quiet: bool = False, say: Say = print,
) -> Outcome:  # fmt: skip
    """Run the recipe in a folder. Every process of a torchrun calls this."""
    with company(config, config.batch.rows) as parallel:
        tell = say if parallel.leader else lambda text: None
        job = assembled(config, out, parallel, tell)
        return carried_out(job, config, out, resume, env or {}, quiet, tell, parallel)


def assembled(config: Dpo, out: Path, parallel: Parallel, say: Say) -> Job:
    """Model, pairs, reference, objective and feed."""
    model, tokenizer = opened(config.model)
    require_room(config.batch.length, model)
    seed = derive_seed(config.seed, "flips")
    pairs = prepared(config.data, Chat(tokenizer, template_of(config.data)), config.batch.length, seed)
    remember_ends(model, tokenizer, (answer[-1] for one in pairs.train for answer in one.answers))
    callbacks = edited(config, model, say)
    objective = PreferenceLoss(
        model, loss=config.loss, beta=config.beta, flips=config.flips, per_token=config.per_token
    )
    packed = feed_of(config, pairs, parallel)
    share = may_share(config) and parallel.kind != "fsdp"  # which shards a block again after its first pass
    packed.source.shared = share
    feed: Feed = packed
    if config.sync is not None:
        moving = Moving(
            packed, model.to(parallel.device), out,
            every=config.sync.every, mix=config.sync.mix, keep=config.checkpoint.keep, leader=parallel.leader,
        )  # fmt: skip
        objective.reference, feed, callbacks = moving, moving, [*callbacks, moving]
    elif config.reference == "adapters_off":
        require_adapters(model)
        objective.reference = lambda batch: without_adapters(model, batch)

    def before() -> Callable[[Path], None]:
        """The reference's log-probabilities: of the held-out pairs always, so that what is measured on them stays
        comparable; of the training pairs where nothing else computes them."""
        kind = precision(config.precision, parallel.device).value
        mine = [] if objective.reference is not None else list(pairs.train)
        found = known(model, [*mine, *pairs.held], out, parallel, kind, say, share=share)
        packed.source.reference = found.log_probs[: len(mine)] or None
        probe.pairs.reference = found.log_probs[len(mine) :]
        return found.keep

    def rewards(model: Any, batch: AnswerBatch) -> Tensor:
        assert batch.reference is not None, "the probe gives it"
        return config.beta * (answer_log_probs(model, batch) - batch.reference)

    probe = HeldPairs(pairs.held, config.evaluate.every, rewards)
    facts = told(config.data, pairs.chat, pairs.ledger, len(pairs.train), len(pairs.held), say)
    riding: list[Callback] = list(callbacks)
    return Job(objective, feed, lambda run: [probe], tokenizer, facts, {"data": packed.source.hash}, riding, before)


def without_adapters(model: Any, batch: AnswerBatch) -> Tensor:
    """The reference is the policy with its adapters off."""
    with adapters_off(model):
        return answer_log_probs(model, batch)
