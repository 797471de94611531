"""Rollouts: a feed the policy writes itself.

      questions -> n samples each -> rewards -> (draw more, until enough groups are mixed) -> advantages -> rows
      rows -> `updates` passes over them, each in `minibatches` parts: so many optimiser steps per rollout

The rows of a step are a function of (seed, step) and the policy's weights: samplers keep no state. What is left of an
unfinished rollout is in the bookmark, so a resumed run goes on with the same bits. No pass is run that is not needed:
the old log-probabilities are those that were sampled, the reference is asked only where a KL term reads it, and a
sample whose advantage is 0 is not read at all where nothing else acts on it: it counts in the loss's divisor alone.

Commonly got wrong: groups without spread left out of the divisor too. GRPO's eq. 3 and Dr. GRPO average over all
samples of all questions (TRL too), so that one mixed group among seven flat ones makes an eighth of a step.
Differs: a step in which every advantage is 0 is skipped, while TRL's optimizer makes one with a gradient of 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_quest.contracts import Share
from llm_quest.data.policy_batch import (
    Notes,
    PolicyBatch,
    PolicyRow,
    micro_batches,
    nothing,
    parted,
    policy_batch,
)
from llm_quest.data.problems.problem import chance
from llm_quest.errors import DataError, UsageError
from llm_quest.models.decoder import Decoder
from llm_quest.rollouts.keeping import kept, taken
from llm_quest.rollouts.sample import Sample
from llm_quest.rollouts.scoring import Scoring, row_of
from llm_quest.rollouts.writer import Question, Writer, evaluating

Ask = Callable[[int], Question]
"""Question number i of an endless list."""
Scorer = Callable[[PolicyBatch], Tensor]
"""A batch -> log-probabilities (B,T) of its targets, or one row of numbers (B,T,T) for each."""
Seen = Callable[[Sequence[Sequence[Sample]], Tensor], None]
"""Groups and their rewards (R,P,G)."""
Gather = Callable[[Any], list[Any]]
"""One process's thing -> everybody's, in the order of ranks."""

PATIENCE = 1000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """prompts, group: how many questions a rollout holds, and samples of each. updates, minibatches: passes over the
    rows, and parts of each pass; their product is the optimiser steps per rollout. draws: dynamic sampling, at most so
    many rounds of questions until `prompts` groups are mixed (1: take what comes). micro_tokens: what a micro-batch
    reads at most. share_prompts: a prompt is read once for all of its samples, where that reads fewer tokens.
    kl_in_reward: beta of k1, taken off the reward. rescore: the trainer scores the samples again before the first
    update, for corrections that compare it with the sampler."""

    prompts: int = 8
    group: int = 8
    updates: int = 1
    minibatches: int = 1
    draws: int = 1
    micro_tokens: int = 4096
    share_prompts: bool = True
    kl_in_reward: float = 0.0
    rescore: bool = False
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.updates * self.minibatches


@dataclass
class Rollout:
    """Number `number` of the run: its rows, and what was seen while it was made."""

    number: int
    rows: list[PolicyRow]
    notes: Notes


class Rollouts:
    """`Rollouts(policy, ask, writer, scoring, plan).at(step) -> micro-batches`.

    reference: scores a batch under the reference policy; needed by a KL term and by nothing else. score: under the
    policy itself (for plan.rescore). look: where its tokens look, kept with the rows (plan.share_prompts off). seen:
    called with the groups of every rollout and their rewards, for whoever wants to look (reports, a reward model's
    data). share, gather: this process's part of the work, and how it hears of the others'. read_all: samples whose
    advantage is 0 are read too, for an objective with an entropy bonus (with a KL term in the loss they are in any
    case)."""

    def __init__(
        self,
        policy: Decoder,
        ask: Ask,
        writer: Writer,
        scoring: Scoring,
        plan: Plan,
        *,
        reference: Scorer | None = None,
        score: Scorer | None = None,
        look: Scorer | None = None,
        seen: Seen | None = None,
        share: Share = Share(),
        gather: Gather = lambda thing: [thing],
        read_all: bool = False,
    ):
        require_sense(plan, reference, score, group=scoring.steps is None)
        self.policy, self.ask, self.writer, self.scoring, self.plan = policy, ask, writer, scoring, plan
        self.reference, self.score, self.look, self.seen = reference, score, look, seen
        if plan.prompts % share.world:
            raise UsageError(
                f"{plan.prompts} prompts cannot be shared by {share.world} processes; make them a multiple of that"
            )
        self.share, self.gather = share, gather
        self.read_all = read_all or (reference is not None and not plan.kl_in_reward)
        self.asked = 0
        self.last = -1
        self.rollout: Rollout | None = None

    def at(self, step: int) -> list[PolicyBatch]:
        """The micro-batches of an optimiser step; a new rollout where one begins."""
        number, inner = divmod(step, self.plan.steps)
        if self.rollout is None or self.rollout.number != number:
            self.rollout = self.write(number)
        self.last = step
        rows = self.minibatch(inner)
        read = self.read(rows)
        zero = [row for row in rows if not row.advantages.any()] if read and not self.read_all else []
        return micro_batches(
            read, self.plan.micro_tokens, self.rollout.notes,
            share=self.plan.share_prompts, part=self.share, idle=self.idle, zero=zero,
        )  # fmt: skip

    def read(self, rows: Sequence[PolicyRow]) -> list[PolicyRow]:
        """Those that a pass has to read: without a term that acts on all samples, those with an advantage."""
        return [row for row in rows if self.read_all or row.advantages.any()]

    @property
    def idle(self) -> PolicyRow:
        """A row with nothing to learn, as complete as the others are."""
        there = {
            "old": self.plan.rescore,
            "reference": self.reference is not None and not self.plan.kl_in_reward,
            "looks": self.look is not None,
        }
        return nothing(*(name for name, said in there.items() if said))

    def minibatch(self, inner: int) -> list[PolicyRow]:
        """Every pass deals all rows out anew."""
        assert self.rollout is not None
        turn, part = divmod(inner, self.plan.minibatches)
        rows = list(self.rollout.rows)
        if self.plan.minibatches > 1:
            chance(self.plan.seed, "deal", self.rollout.number, turn).shuffle(rows)
        return rows[part :: self.plan.minibatches]

    def write(self, number: int) -> Rollout:
        """Sample, judge, and keep what there is to learn from."""
        clock = [time.perf_counter()]
        groups, rewards, notes = self.drawn(number)
        clock.append(time.perf_counter())
        penalty, references = None, None
        if self.plan.kl_in_reward:
            references = self.scored([row_of(s, silent(s)) for group in groups for s in group], self.reference)
            penalty = self.plan.kl_in_reward * divergence(groups, references).reshape(rewards.shape[1:])
        advantages = self.scoring.advantages(groups, rewards, penalty)
        if self.seen is not None:
            self.seen(groups, rewards)
        rows = [
            row_of(sample, each)
            for group, found in zip(groups, advantages, strict=True)
            for sample, each in zip(group, found, strict=True)
            if each is not None
        ]
        rows = self.completed(rows)
        clock.append(time.perf_counter())
        seconds = {"seconds_sampling": (clock[1] - clock[0], 1.0), "seconds_scoring": (clock[2] - clock[1], 1.0)}
        return Rollout(number, rows, {**notes, "rows_kept": (len(self.read(rows)), total(groups)), **seconds})

    def completed(self, rows: Sequence[PolicyRow]) -> list[PolicyRow]:
        """The same rows in the same order; those that are read with what is scored on them."""
        read = self.read(rows)
        more: list[dict[str, Any]] = [{} for _ in read]
        if self.plan.rescore:
            for found, old in zip(more, self.scored(read, self.score), strict=True):
                found["old"] = old
        if self.reference is not None and not self.plan.kl_in_reward:
            for found, other in zip(more, self.scored(read, self.reference), strict=True):
                found["reference"] = other
        if self.look is not None:
            for row, found, looks in zip(read, more, self.scored(read, self.look), strict=True):
                found["looks"] = looks[:, : row.length]
        scored = {id(row): replace(row, **found) for row, found in zip(read, more, strict=True)}
        return [scored.get(id(row), row) for row in rows]

    def drawn(self, number: int) -> tuple[list[list[Sample]], Tensor, dict[str, tuple[float, float]]]:
        """Groups and rewards (R,P,G), after as many rounds as dynamic sampling takes; and notes on all that was
        seen."""
        plan, groups, found = self.plan, [], []
        everything: list[list[Sample]] = []
        judged: list[Tensor] = []
        for round_ in range(plan.draws):
            some, rewards = self.sampled(chance(plan.seed, "write", number, round_).getrandbits(62))
            everything, judged = everything + some, [*judged, rewards]
            keep = [True] * len(some) if plan.draws == 1 else self.scoring.mixed(rewards)
            groups += [group for group, stays in zip(some, keep, strict=True) if stays]
            found.append(rewards[:, torch.tensor(keep)])
            if len(groups) >= plan.prompts:
                break
        notes = self.noted(everything, torch.cat(judged, dim=1)) | {"draws": (round_ + 1.0, 1.0)}
        return groups[: plan.prompts], torch.cat(found, dim=1)[:, : plan.prompts], notes

    def sampled(self, seed: int) -> tuple[list[list[Sample]], Tensor]:
        """One round: groups and rewards (R,P,G) of the next questions, each process writing its part. (As `at_once`
        does, the place of its first question is added to the seed: equal questions get different answers.)"""
        questions = self.questions()
        each = len(questions) // self.share.world
        first = self.share.rank * each
        mine = self.writer(self.policy, questions[first : first + each], self.plan.group, seed + first)
        parts = self.gather((mine, self.scoring.judged(mine)))
        return [group for groups, _ in parts for group in groups], torch.cat([rewards for _, rewards in parts], dim=1)

    def questions(self) -> list[Question]:
        """The next ones that leave room for an answer."""
        found: list[Question] = []
        context, tried = self.policy.config.context, 0
        while len(found) < self.plan.prompts:
            question = self.ask(self.asked)
            self.asked, tried = self.asked + 1, tried + 1
            if len(question.prompt) + self.writer.new_tokens <= context:
                found.append(question)
            elif tried - len(found) >= PATIENCE:
                raise DataError(
                    f"{PATIENCE} prompts leave no room for {self.writer.new_tokens} new tokens in the model's context "
                    f"of {context} (the last has {len(question.prompt)}): shorten the prompts or the budget"
                )
        return found

    def scored(self, rows: Sequence[PolicyRow], score: Scorer | None) -> list[np.ndarray]:
        """Log-probabilities of every row's tokens, in the rows' order; each process scores its part."""
        assert score is not None
        found: dict[int, np.ndarray] = {}
        device = next(self.policy.parameters()).device
        place = {id(row): number for number, row in enumerate(rows)}
        groups, shared = parted(rows, self.plan.micro_tokens, share=self.plan.share_prompts)
        with torch.no_grad(), evaluating(self.policy), self.writer.within():
            for some in groups[self.share.rank :: self.share.world]:
                batch = policy_batch(some, shared=shared)
                values = score(batch.to(device)).float().cpu()
                for row, value, learn in zip(some, values, batch.learn, strict=True):
                    found[place[id(row)]] = value[learn].numpy()
        everything = {number: value for part in self.gather(found) for number, value in part.items()}
        return [everything[number] for number in range(len(rows))]

    def noted(self, groups: Sequence[Sequence[Sample]], rewards: Tensor) -> dict[str, tuple[float, float]]:
        """What was seen, as (sum, count) pairs."""
        samples = [sample for group in groups for sample in group]
        known = ~rewards.isnan()
        judges = {judge.name: place for place, judge in enumerate(self.scoring.judges)}
        tokens = sum(len(sample.tokens) for sample in samples)
        counts = {
            "flat": (sum(not one for one in self.scoring.mixed(rewards)), len(groups)),
            "truncated": (sum(sample.truncated for sample in samples), len(samples)),
            "unscorable": (float((~known).any(dim=0).sum()), len(samples)),
            "length": (tokens, len(samples)),
            "entropy": (-sum(sum(sample.logprobs) for sample in samples), tokens),
        }
        told = {
            f"reward_{name}" if place else "reward": (float(rewards[place].nansum()), float(known[place].sum()))
            for name, place in judges.items()
        }
        return {name: (float(a), float(b)) for name, (a, b) in {**told, **counts}.items()}

    def bookmark(self) -> dict[str, Any]:
        """The place in the list of questions and, in the middle of a rollout, what is left to learn from it."""
        middle = self.rollout is not None and (self.last + 1) % self.plan.steps != 0
        held = None
        if middle and self.rollout is not None:
            rows = [kept(row) for row in self.rollout.rows]
            held = {"number": self.rollout.number, "rows": rows, "notes": dict(self.rollout.notes)}
        return {"plan": asdict(self.plan), "asked": self.asked, "held": held}

    def resume(self, bookmark: dict[str, Any]) -> None:
        changed = [name for name, value in asdict(self.plan).items() if bookmark["plan"].get(name) != value]
        if changed:
            raise ValueError(f"the bookmark belongs to other rollouts: {', '.join(changed)} differ")
        self.asked, held = bookmark["asked"], bookmark["held"]
        self.rollout = None
        if held is not None:
            notes = {name: (pair[0], pair[1]) for name, pair in held["notes"].items()}
            self.rollout = Rollout(held["number"], [taken(row) for row in held["rows"]], notes)


def require_sense(plan: Plan, reference: Scorer | None, score: Scorer | None, *, group: bool) -> None:
    if plan.group < 2 and group:
        raise UsageError(
            f"group is {plan.group}: a sample is judged beside its siblings; take at least 2 (one alone has no spread)"
        )
    if plan.kl_in_reward and reference is None:
        raise UsageError("KL in the reward needs a reference policy")
    if plan.rescore and score is None:
        raise UsageError("rescoring needs the policy's scorer")


def divergence(groups: Sequence[Sequence[Sample]], references: Sequence[np.ndarray]) -> Tensor:
    """k1 summed over each sample: log pi - log pi_ref of the whole completion, (P,G)."""
    theirs = iter(references)
    found = [[sum(sample.logprobs) - float(next(theirs).sum()) for sample in group] for group in groups]
    return torch.tensor(found, dtype=torch.float64)


def silent(sample: Sample) -> np.ndarray:
    return np.zeros(len(sample.tokens), np.float32)


def total(groups: Sequence[Sequence[Sample]]) -> int:
    return sum(len(group) for group in groups)
