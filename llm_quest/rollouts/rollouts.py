"""Rollouts: a feed the policy writes itself.

      questions -> n samples each -> rewards -> (draw more, until enough groups are mixed) -> advantages -> rows
      rows -> `num_iterations` passes over them, each in `minibatches` parts: so many optimiser steps per rollout

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

from llm_quest.contracts import DataShard
from llm_quest.data.policy_batch import (
    MetricSums,
    PolicyBatch,
    PolicyRow,
    collate_policy_rows,
    empty_row,
    micro_batches,
    plan_micro_batches,
)
from llm_quest.data.problems.problem import make_rng
from llm_quest.errors import DataError, UsageError
from llm_quest.models.decoder import Decoder
from llm_quest.rollouts.reward_pipeline import RewardPipeline, make_policy_row
from llm_quest.rollouts.row_json import row_from_json, row_to_json
from llm_quest.rollouts.sample import Sample
from llm_quest.rollouts.sampler import PolicyPrompt, Sampler, eval_mode

PromptSource = Callable[[int], PolicyPrompt]
"""Question number i of an endless list."""
LogProbScorer = Callable[[PolicyBatch], Tensor]
"""A batch -> log-probabilities (B,T) of its targets, or one row of numbers (B,T,T) for each."""
RolloutCallback = Callable[[Sequence[Sequence[Sample]], Tensor], None]
"""Groups and their rewards (R,P,G)."""
AllGather = Callable[[Any], list[Any]]
"""One process's thing -> everybody's, in the order of ranks."""

MAX_REJECTED_PROMPTS = 1000


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """prompts_per_rollout, num_generations: how many questions a rollout holds, and samples of each. num_iterations,
    minibatches: passes over the rows, and parts of each pass; their product is the optimiser steps per rollout.
    max_sampling_rounds: dynamic sampling, at most so many rounds of questions until `prompts` groups are mixed (1: take
    what comes). max_micro_batch_tokens: what a micro-batch reads at most. share_prompts: a prompt is read once for all
    of its samples, where that reads fewer tokens. kl_coef: beta of k1, taken off the reward. rescore_old_log_probs: the
    trainer scores the samples again before the first update, for corrections that compare it with the sampler."""

    prompts_per_rollout: int = 8
    num_generations: int = 8
    num_iterations: int = 1
    minibatches: int = 1
    max_sampling_rounds: int = 1
    max_micro_batch_tokens: int = 4096
    share_prompts: bool = True
    kl_coef: float = 0.0
    rescore_old_log_probs: bool = False
    seed: int = 0

    @property
    def steps_per_rollout(self) -> int:
        return self.num_iterations * self.minibatches


@dataclass
class RolloutBuffer:
    """Number `number` of the run: its rows, and what was seen while it was made."""

    number: int
    rows: list[PolicyRow]
    metric_sums: MetricSums


class RolloutLoader:
    """`RolloutLoader(policy, ask, writer, reward_pipeline, plan).at(step) -> micro_batch-batches`.

    reference_scorer: scores a batch under the reference policy; needed by a KL term and by nothing else. policy_scorer:
    under the policy itself (for plan.rescore). attention_scorer: where its tokens look, kept with the rows
    (plan.share_prompts off). on_rollout: called with the groups of every rollout and their rewards, for whoever wants
    to look (reports, a reward model's data). share, all_gather: this process's part of the work, and how it hears of
    the others'. read_all: samples whose advantage is 0 are read too, for an objective with an entropy bonus (with a KL
    term in the loss they are in any case)."""

    def __init__(
        self,
        policy: Decoder,
        prompt_source: PromptSource,
        sampler: Sampler,
        reward_pipeline: RewardPipeline,
        plan: RolloutPlan,
        *,
        reference_scorer: LogProbScorer | None = None,
        policy_scorer: LogProbScorer | None = None,
        attention_scorer: LogProbScorer | None = None,
        on_rollout: RolloutCallback | None = None,
        share: DataShard = DataShard(),
        all_gather: AllGather = lambda thing: [thing],
        read_all: bool = False,
    ):
        validate_plan(plan, reference_scorer, policy_scorer, group=reward_pipeline.step_rewards is None)
        self.policy, self.prompt_source, self.sampler, self.reward_pipeline, self.plan = (
            policy,
            prompt_source,
            sampler,
            reward_pipeline,
            plan,
        )
        self.reference_scorer, self.policy_scorer, self.attention_scorer, self.on_rollout = (
            reference_scorer,
            policy_scorer,
            attention_scorer,
            on_rollout,
        )
        if plan.prompts_per_rollout % share.world_size:
            raise UsageError(
                f"{plan.prompts_per_rollout} prompts cannot be shared by {share.world_size} processes; make them a multiple of that"
            )
        self.share, self.all_gather = share, all_gather
        self.read_all = read_all or (reference_scorer is not None and not plan.kl_coef)
        self.num_prompts_taken = 0
        self.last_step = -1
        self.rollout: RolloutBuffer | None = None

    def batches(self, step: int) -> list[PolicyBatch]:
        """The micro-batches of an optimiser step; a new rollout where one begins."""
        number, inner = divmod(step, self.plan.steps_per_rollout)
        if self.rollout is None or self.rollout.number != number:
            self.rollout = self.generate_rollout(number)
        self.last_step = step
        rows = self.minibatch(inner)
        read = self.read(rows)
        zero = [row for row in rows if not row.advantages.any()] if read and not self.read_all else []
        return micro_batches(
            read, self.plan.max_micro_batch_tokens, self.rollout.metric_sums,
            share_prompts=self.plan.share_prompts, shard=self.share, filler=self.filler_row, zero=zero,
        )  # fmt: skip

    def read(self, rows: Sequence[PolicyRow]) -> list[PolicyRow]:
        """Those that a pass has to read: without a term that acts on all samples, those with an advantage."""
        return [row for row in rows if self.read_all or row.advantages.any()]

    @property
    def filler_row(self) -> PolicyRow:
        """A row with nothing to learn, as complete as the others are."""
        there = {
            "old_log_probs": self.plan.rescore_old_log_probs,
            "reference_log_probs": self.reference_scorer is not None and not self.plan.kl_coef,
            "attention_maps": self.attention_scorer is not None,
        }
        return empty_row(*(name for name, said in there.items() if said))

    def minibatch(self, step_in_rollout: int) -> list[PolicyRow]:
        """Every pass deals all rows out anew."""
        assert self.rollout is not None
        turn, part = divmod(step_in_rollout, self.plan.minibatches)
        rows = list(self.rollout.rows)
        if self.plan.minibatches > 1:
            make_rng(self.plan.seed, "deal", self.rollout.number, turn).shuffle(rows)
        return rows[part :: self.plan.minibatches]

    def generate_rollout(self, number: int) -> RolloutBuffer:
        """Sample, judge, and keep what there is to learn from."""
        clock = [time.perf_counter()]
        groups, rewards, notes = self.sample_groups(number)
        clock.append(time.perf_counter())
        penalty, references = None, None
        if self.plan.kl_coef:
            references = self.score_rows(
                [make_policy_row(s, zero_advantages(s)) for group in groups for s in group], self.reference_scorer
            )
            penalty = self.plan.kl_coef * sequence_kl(groups, references).reshape(rewards.shape[1:])
        advantages = self.reward_pipeline.compute_advantages(groups, rewards, penalty)
        if self.on_rollout is not None:
            self.on_rollout(groups, rewards)
        rows = [
            make_policy_row(sample, each)
            for group, found in zip(groups, advantages, strict=True)
            for sample, each in zip(group, found, strict=True)
            if each is not None
        ]
        rows = self.completed(rows)
        clock.append(time.perf_counter())
        seconds = {"seconds_sampling": (clock[1] - clock[0], 1.0), "seconds_scoring": (clock[2] - clock[1], 1.0)}
        return RolloutBuffer(
            number, rows, {**notes, "rows_kept": (len(self.read(rows)), count_samples(groups)), **seconds}
        )

    def completed(self, rows: Sequence[PolicyRow]) -> list[PolicyRow]:
        """The same rows in the same order; those that are read with what is scored on them."""
        read = self.read(rows)
        more: list[dict[str, Any]] = [{} for _ in read]
        if self.plan.rescore_old_log_probs:
            for found, old in zip(more, self.score_rows(read, self.policy_scorer), strict=True):
                found["old_log_probs"] = old
        if self.reference_scorer is not None and not self.plan.kl_coef:
            for found, other in zip(more, self.score_rows(read, self.reference_scorer), strict=True):
                found["reference_log_probs"] = other
        if self.attention_scorer is not None:
            for row, found, looks in zip(read, more, self.score_rows(read, self.attention_scorer), strict=True):
                found["attention_maps"] = looks[:, : row.length]
        scored = {id(row): replace(row, **found) for row, found in zip(read, more, strict=True)}
        return [scored.get(id(row), row) for row in rows]

    def sample_groups(self, number: int) -> tuple[list[list[Sample]], Tensor, dict[str, tuple[float, float]]]:
        """Groups and rewards (R,P,G), after as many rounds as dynamic sampling takes; and notes on all that was
        seen."""
        plan, groups, found = self.plan, [], []
        all_groups: list[list[Sample]] = []
        all_rewards: list[Tensor] = []
        for round_ in range(plan.max_sampling_rounds):
            some, rewards = self.sample_round(make_rng(plan.seed, "write", number, round_).getrandbits(62))
            all_groups, all_rewards = all_groups + some, [*all_rewards, rewards]
            keep = [True] * len(some) if plan.max_sampling_rounds == 1 else self.reward_pipeline.is_mixed(rewards)
            groups += [group for group, stays in zip(some, keep, strict=True) if stays]
            found.append(rewards[:, torch.tensor(keep)])
            if len(groups) >= plan.prompts_per_rollout:
                break
        notes = self.rollout_metrics(all_groups, torch.cat(all_rewards, dim=1)) | {"draws": (round_ + 1.0, 1.0)}
        return groups[: plan.prompts_per_rollout], torch.cat(found, dim=1)[:, : plan.prompts_per_rollout], notes

    def sample_round(self, seed: int) -> tuple[list[list[Sample]], Tensor]:
        """One round: groups and rewards (R,P,G) of the next questions, each process writing its part. (As `at_once`
        does, the place of its first question is added to the seed: equal questions get different answers.)"""
        questions = self.next_prompts()
        each = len(questions) // self.share.world_size
        first = self.share.rank * each
        mine = self.sampler(self.policy, questions[first : first + each], self.plan.num_generations, seed + first)
        parts = self.all_gather((mine, self.reward_pipeline.compute_rewards(mine)))
        return [group for groups, _ in parts for group in groups], torch.cat([rewards for _, rewards in parts], dim=1)

    def next_prompts(self) -> list[PolicyPrompt]:
        """The next ones that leave room for an answer."""
        found: list[PolicyPrompt] = []
        context, tried = self.policy.config.max_position_embeddings, 0
        while len(found) < self.plan.prompts_per_rollout:
            question = self.prompt_source(self.num_prompts_taken)
            self.num_prompts_taken, tried = self.num_prompts_taken + 1, tried + 1
            if len(question.prompt_ids) + self.sampler.max_new_tokens <= context:
                found.append(question)
            elif tried - len(found) >= MAX_REJECTED_PROMPTS:
                raise DataError(
                    f"{MAX_REJECTED_PROMPTS} prompts leave no room for {self.sampler.max_new_tokens} new tokens in the model's context "
                    f"of {context} (the last has {len(question.prompt_ids)}): shorten the prompts or the budget"
                )
        return found

    def score_rows(self, rows: Sequence[PolicyRow], scorer: LogProbScorer | None) -> list[np.ndarray]:
        """Log-probabilities of every row's tokens, in the rows' order; each process scores its part."""
        assert scorer is not None
        found: dict[int, np.ndarray] = {}
        device = next(self.policy.parameters()).device
        place = {id(row): number for number, row in enumerate(rows)}
        groups, shared = plan_micro_batches(
            rows, self.plan.max_micro_batch_tokens, share_prompts=self.plan.share_prompts
        )
        with torch.no_grad(), eval_mode(self.policy), self.sampler.autocast_context():
            for some in groups[self.share.rank :: self.share.world_size]:
                batch = collate_policy_rows(some, share_prompts=shared)
                values = scorer(batch.to(device)).float().cpu()
                for row, value, learn in zip(some, values, batch.loss_mask, strict=True):
                    found[place[id(row)]] = value[learn].numpy()
        everything = {number: value for part in self.all_gather(found) for number, value in part.items()}
        return [everything[number] for number in range(len(rows))]

    def rollout_metrics(self, groups: Sequence[Sequence[Sample]], rewards: Tensor) -> dict[str, tuple[float, float]]:
        """What was seen, as (sum, count) pairs."""
        samples = [sample for group in groups for sample in group]
        known = ~rewards.isnan()
        reward_rows = {judge.name: place for place, judge in enumerate(self.reward_pipeline.rewards)}
        tokens = sum(len(sample.completion_ids) for sample in samples)
        counts = {
            "flat": (sum(not one for one in self.reward_pipeline.is_mixed(rewards)), len(groups)),
            "truncated": (sum(sample.truncated for sample in samples), len(samples)),
            "unscorable": (float((~known).any(dim=0).sum()), len(samples)),
            "length": (tokens, len(samples)),
            "entropy": (-sum(sum(sample.logprobs) for sample in samples), tokens),
        }
        reward_sums = {
            f"reward_{name}" if place else "reward": (float(rewards[place].nansum()), float(known[place].sum()))
            for name, place in reward_rows.items()
        }
        return {name: (float(a), float(b)) for name, (a, b) in {**reward_sums, **counts}.items()}

    def state_dict(self) -> dict[str, Any]:
        """The place in the list of questions and, in the middle of a rollout, what is left to learn from it."""
        middle = self.rollout is not None and (self.last_step + 1) % self.plan.steps_per_rollout != 0
        unfinished = None
        if middle and self.rollout is not None:
            rows = [row_to_json(row) for row in self.rollout.rows]
            unfinished = {"number": self.rollout.number, "rows": rows, "notes": dict(self.rollout.metric_sums)}
        return {"plan": asdict(self.plan), "asked": self.num_prompts_taken, "held": unfinished}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        changed = [name for name, value in asdict(self.plan).items() if state_dict["plan"].get(name) != value]
        if changed:
            raise ValueError(f"the bookmark belongs to other rollouts: {', '.join(changed)} differ")
        self.num_prompts_taken, held = state_dict["asked"], state_dict["held"]
        self.rollout = None
        if held is not None:
            notes = {name: (pair[0], pair[1]) for name, pair in held["notes"].items()}
            self.rollout = RolloutBuffer(held["number"], [row_from_json(row) for row in held["rows"]], notes)


def validate_plan(
    plan: RolloutPlan, reference_scorer: LogProbScorer | None, policy_scorer: LogProbScorer | None, *, group: bool
) -> None:
    if plan.num_generations < 2 and group:
        raise UsageError(
            f"group is {plan.num_generations}: a sample is judged beside its siblings; take at least 2 (one alone has no spread)"
        )
    if plan.kl_coef and reference_scorer is None:
        raise UsageError("KL in the reward needs a reference policy")
    if plan.rescore_old_log_probs and policy_scorer is None:
        raise UsageError("rescoring needs the policy's scorer")


def sequence_kl(groups: Sequence[Sequence[Sample]], references: Sequence[np.ndarray]) -> Tensor:
    """k1 summed over each sample: log pi - log pi_ref of the whole completion, (P,G)."""
    theirs = iter(references)
    found = [[sum(sample.logprobs) - float(next(theirs).sum()) for sample in group] for group in groups]
    return torch.tensor(found, dtype=torch.float64)


def zero_advantages(sample: Sample) -> np.ndarray:
    return np.zeros(len(sample.completion_ids), np.float32)


def count_samples(groups: Sequence[Sequence[Sample]]) -> int:
    return sum(len(group) for group in groups)
