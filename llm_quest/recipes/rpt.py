"""`quest train rpt`: reinforcement pre-training (arXiv:2506.08007). A model and plain text -> a model that thinks
before it says the next token.

      documents -> places that a proxy finds hard -> "think, then foretell", n samples each -> right, to the byte and to
      a token's end: 1, else 0 -> policy gradient, with held-out accuracy by how hard the proxy finds the place

What is spent is counted in FLOPs (`teraflops` in the metrics), so that `quest train rpt_control` can spend as much on
plain next tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from llm_quest.contracts import Probe, Reward
from llm_quest.data.packing import shuffled
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.models.flops import Cost, cost_of
from llm_quest.recipes.course import Outcome
from llm_quest.recipes.foretold import TABLES, ByBucket
from llm_quest.recipes.policy import Learner, Say, entered, learner, writer_of
from llm_quest.recipes.policy_probes import Extremes
from llm_quest.recipes.rpt_config import Rpt
from llm_quest.recipes.rpt_start import Begun, begun
from llm_quest.recipes.rpt_text import Passage, Places, passage, places
from llm_quest.recipes.tuning import Job, carried_out
from llm_quest.recipes.yaml import Settings
from llm_quest.rollouts.buckets import Foretelling
from llm_quest.rollouts.doctor import Doctor
from llm_quest.rollouts.metered import Meter, Metered
from llm_quest.rollouts.positions import Position
from llm_quest.rollouts.prefix_match import Answered, PrefixMatch
from llm_quest.rollouts.rewards import RandomReward
from llm_quest.rollouts.scoring import Judge
from llm_quest.rollouts.writer import Question
from llm_quest.train.parallel import Parallel
from llm_quest.train.run import Run
from llm_quest.train.state import derive_seed


def train_rpt(
    config: Rpt, settings: Settings, out: Path, *, resume: str = "auto", env: Mapping[str, Any] | None = None,
    quiet: bool = False, say: Say = print,
) -> Outcome:  # fmt: skip
    """Run the recipe in a folder. Beside the run: positions.json, foretold.json; a fresh model's base/ and warmup/."""
    with entered(config, out, say) as (config, parallel, tell):
        made = assembled(config, settings, out, parallel, tell)
        made.eye.show("before", tell)
        outcome = carried_out(made.job, config, out, resume, env or {}, quiet, tell, parallel)
        if outcome.status == "finished":
            made.eye.show("after", tell)
        return outcome


@dataclass(frozen=True)
class Made:
    """The recipe's job, and the eye it keeps on held-out places."""

    job: Job
    eye: ByBucket


def assembled(config: Rpt, settings: Settings, out: Path, parallel: Parallel, say: Say) -> Made:
    """Model, text, places, rollouts, objective."""
    start = begun(config, settings, out, parallel, say)
    text = passage(config, start.tokenizer, start.model.config.context, parallel, say)
    reading = cost_of(start.proxy)
    flops = sum(reading.forward(len(ids) - 1) for ids in text.train)
    found = parallel.broadcast(places(config, start.proxy, flops, text, out) if parallel.leader else None)
    say(f"places: {len(found.train):,} to think about, {len(found.held_out):,} held out{lost(found)}")
    cost = cost_of(start.model)
    made, meter = rollouts(config, start, text, found, cost, parallel, say)
    eye = ByBucket(
        foretelling(config, start.model, start.tokenizer, text, found, parallel), start.model, config.evaluate.every,
        out / TABLES if parallel.leader else None,
    )  # fmt: skip

    def probes(run: Run) -> Sequence[Probe]:
        eye.samples = run.samples if run.leader else None
        return [eye, Extremes(made.objective, config.log_every)]

    facts = {"source": config.data.source, **found.facts, "tokenizer_sha256": start.tokenizer.hash}
    job = Job(
        made.objective, Metered(made.feed, meter), probes, start.tokenizer, facts, {"documents": text.hash},
        made.riding, watchers=[Doctor(config.patience)],
    )  # fmt: skip
    return Made(job, eye)


def lost(found: Places) -> str:
    return "".join(f"; dropped, {why}: {number:,}" for why, number in found.facts["dropped_places"].items())


def rollouts(
    config: Rpt, start: Begun, text: Passage, found: Places, cost: Cost, parallel: Parallel, say: Say
) -> tuple[Learner, Meter]:
    """Every place once per epoch, in an order of its own. The meter begins with what finding the places cost."""
    ask = partial(asked, text, found.train, derive_seed(config.seed, "order"))
    meter = Meter(cost, scorings=(config.kl is not None) + (config.correction is not None), flops=found.flops)
    judges = [Judge(config.reward, REWARDS[config.reward](config))]
    made = learner(config, start.model, start.tokenizer, ask, judges, parallel, say, seen=meter.sampled)
    return made, meter


def asked(text: Passage, found: Sequence[Position], seed: int, index: int) -> Question:
    """Question number `index` of an endless list."""
    epoch, at = divmod(index, len(found))
    one = found[dealt(len(found), seed, epoch)[at]]
    return text.asking.question(text.train[one.document], one.place)


@lru_cache(maxsize=2)
def dealt(number: int, seed: int, epoch: int) -> list[int]:
    return list(shuffled(number, seed, epoch))


def foretelling(
    config: Rpt, model: Decoder, tokenizer: Tokenizer, text: Passage, found: Places, parallel: Parallel
) -> Foretelling:
    """How held-out places are looked at."""
    writer = writer_of(config, model, tokenizer, parallel)
    return Foretelling(text.held_out, found.held_out, text.asking, writer, PrefixMatch(config.ask.opening))


REWARDS: dict[str, Callable[[Rpt], Reward]] = {
    "prefix": lambda config: PrefixMatch(config.ask.opening),
    "format": lambda config: Answered(config.ask.opening),
    "random": lambda config: RandomReward(derive_seed(config.seed, "random reward")),
}
