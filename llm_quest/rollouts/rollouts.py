"""Loads rollouts: rows that the policy generates itself, with rewards and advantages.

      prompts -> groups of samples -> rewards -> advantages -> rows -> micro-batches of each optimizer step

A rollout serves `num_iterations` passes, each of `minibatches` optimizer steps; with dynamic sampling it takes rounds
of prompts until enough groups are mixed. The rows of a step are a function of (seed, step) and the policy's weights:
samplers keep no state. What is left of an unfinished rollout is in the checkpoint, so a resumed run goes on with the
same bits, and one on another number of processes with the same texts. No pass is run that is not needed: the old
log-probabilities are those that were sampled, the reference is scored only where a KL term reads it, and a sample whose
advantage is 0 is not read at all where nothing else acts on it: it counts in the loss's divisor alone.

Commonly got wrong: groups without spread left out of the divisor too. GRPO's eq. 3 and Dr. GRPO average over all
samples of all prompts (TRL too), so that one mixed group among seven without spread makes an eighth of a step.
Differs: a step in which every advantage is 0 is skipped, while TRL's optimizer makes one with a gradient of 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llm_quest.contracts import ProcessGroup, SingleProcess
from llm_quest.data.policy_batch import (
    MetricSums,
    PolicyBatch,
    PolicyRow,
    collate_policy_rows,
    empty_row,
    micro_batches,
    plan_micro_batches,
    row_from_json,
    row_to_json,
)
from llm_quest.data.problems.problem import make_rng
from llm_quest.errors import DataError, UsageError
from llm_quest.models.decoder import Decoder
from llm_quest.rollouts.advantages import RewardPipeline, sampling_metrics
from llm_quest.rollouts.sampler import (
    ContextFactory,
    PolicyPrompt,
    RolloutSampler,
    SampleGroups,
    eval_mode,
    make_policy_row,
    make_policy_rows,
)

if TYPE_CHECKING:
    from llm_quest.rollouts.gae import GAE

PromptSource = Callable[[int], PolicyPrompt]
"""Prompt number i of an endless list."""
RowScorer = Callable[[PolicyBatch], Tensor]
"""A batch -> one number (B,T) at each of its targets, or one row of numbers (B,T,T)."""

MAX_REJECTED_PROMPTS = 1000


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """The sizes of a rollout: prompts, samples of each (`num_generations`), optimizer steps.

    num_iterations, minibatches: passes over the rows, and parts of each pass; their product is the number of optimizer
    steps per rollout. max_sampling_rounds: dynamic sampling (DAPO), rounds of prompts until `prompts_per_rollout`
    groups have a spread; 1: all groups are taken. max_micro_batch_tokens: tokens that a micro-batch reads, at most.
    share_prompts: a prompt is read once for all of its samples, where that reads fewer tokens. kl_coef: weight of the
    KL penalty (k1) in the reward."""

    prompts_per_rollout: int = 8
    num_generations: int = 8
    num_iterations: int = 1
    minibatches: int = 1
    max_sampling_rounds: int = 1
    max_micro_batch_tokens: int = 4096
    share_prompts: bool = True
    kl_coef: float = 0.0
    seed: int = 0

    @property
    def steps_per_rollout(self) -> int:
        return self.num_iterations * self.minibatches


@dataclass(frozen=True)
class ValueBaseline:
    """A value of each token in place of the mean of a group. scorer: a batch -> the value head's (B,T)."""

    scorer: RowScorer
    gae: GAE


@dataclass
class RolloutBuffer:
    """One rollout: its rows, its metrics, and all groups that were sampled for it (none after a resumption)."""

    number: int
    rows: list[PolicyRow]
    metric_sums: MetricSums
    groups: SampleGroups


class RolloutLoader:
    """`RolloutLoader(policy, prompts, sampler, rewards, plan).batches(step) -> micro-batches of an optimizer step`.

    scorers: a field of `PolicyRow` -> what fills it: old_log_probs (the trainer's own, where they may differ from the
    sampler's), reference_log_probs (for a KL term), attention_maps (not with plan.share_prompts). read_all: rows whose
    advantage is 0 are read too, for an objective with an entropy bonus (with a KL term in the loss they are in any
    case). value_baseline: GAE in place of the comparison within the group, with rewards as the pipeline's estimator
    gives them. whole_policy: inside it a sharded policy is whole in every process (FSDP2), so that each of them samples
    and scores at its own pace."""

    def __init__(
        self,
        policy: Decoder,
        prompt_source: PromptSource,
        sampler: RolloutSampler,
        reward_pipeline: RewardPipeline,
        plan: RolloutPlan,
        *,
        scorers: Mapping[str, RowScorer] | None = None,
        processes: ProcessGroup = SingleProcess(),
        read_all: bool = False,
        whole_policy: ContextFactory = nullcontext,
        value_baseline: ValueBaseline | None = None,
        routing_scorer: RowScorer | None = None,
    ):
        self.policy, self.prompt_source, self.sampler = policy, prompt_source, sampler
        self.reward_pipeline, self.plan, self.processes = reward_pipeline, plan, processes
        self.scorers, self.value_baseline = dict(scorers or {}), value_baseline
        self.routing_scorer = routing_scorer
        self.require_consistent_plan()
        self.reference_scorer = self.scorers.pop("reference_log_probs") if plan.kl_coef else None
        self.read_all = read_all or "reference_log_probs" in self.scorers or value_baseline is not None
        self.whole_policy = whole_policy
        self.num_prompts_taken = 0
        self.last_step = -1
        self.rollout: RolloutBuffer | None = None
        self.before_step: tuple[int, int, RolloutBuffer | None] = (0, -1, None)

    def require_consistent_plan(self) -> None:
        plan, world_size = self.plan, self.processes.data_shard.world_size
        if plan.num_generations < 2 and self.reward_pipeline.step_rewards is None and self.value_baseline is None:
            raise UsageError(
                f"num_generations is {plan.num_generations}: a sample is compared with others of its group; take at "
                "least 2 (one alone has no spread)"
            )
        if plan.kl_coef and "reference_log_probs" not in self.scorers:
            raise UsageError(
                f"kl_coef is {plan.kl_coef:g}: a KL penalty needs a reference policy; give scorers reference_log_probs"
            )
        if plan.prompts_per_rollout % world_size:
            raise UsageError(
                f"{plan.prompts_per_rollout} prompts cannot be shared by {world_size} processes; make them a multiple "
                "of that"
            )

    def batches(self, step: int) -> list[PolicyBatch]:
        """The micro-batches of an optimizer step; a new rollout where one begins."""
        number, step_in_rollout = divmod(step, self.plan.steps_per_rollout)
        self.before_step = (self.num_prompts_taken, self.last_step, self.rollout)
        if self.rollout is None or self.rollout.number != number:
            self.rollout = self.generate_rollout(number)
        self.last_step = step
        rows = self.minibatch(step_in_rollout)
        read = self.rows_to_read(rows)
        zero = [row for row in rows if not row.advantages.any()] if read and not self.read_all else []
        return micro_batches(
            read, self.plan.max_micro_batch_tokens, self.rollout.metric_sums,
            share_prompts=self.plan.share_prompts, shard=self.processes.data_shard, filler=self.filler(),
            zero=zero,
        )  # fmt: skip

    def filler(self) -> PolicyRow:
        """A row with nothing to learn, with the fields of this loader's rows."""
        return empty_row(*self.scorers, *(() if self.value_baseline is None else ("values", "returns")))

    def minibatch(self, step_in_rollout: int) -> list[PolicyRow]:
        """The rows of one step of the rollout; every pass shuffles them anew."""
        assert self.rollout is not None
        iteration, part = divmod(step_in_rollout, self.plan.minibatches)
        rows = list(self.rollout.rows)
        if self.plan.minibatches > 1:
            make_rng(self.plan.seed, "deal", self.rollout.number, iteration).shuffle(rows)
        return rows[part :: self.plan.minibatches]

    def rows_to_read(self, rows: Sequence[PolicyRow]) -> list[PolicyRow]:
        """The rows that a pass has to read: where no term acts on all samples, those with an advantage."""
        return [row for row in rows if self.read_all or row.advantages.any()]

    # ------------------------------------------------------------------------------------------ the pipeline

    def generate_rollout(self, number: int) -> RolloutBuffer:
        """Sample groups of completions, reward them, compute their advantages, and make rows of them."""
        with self.whole_policy():
            return self.rollout_of_whole_policy(number)

    def rollout_of_whole_policy(self, number: int) -> RolloutBuffer:
        start = time.perf_counter()
        sampled, groups, rewards, metrics = self.sample_rollout(number)
        sampling_end = time.perf_counter()
        by_text = self.plan.kl_coef and self.value_baseline is None
        penalty = self.kl_penalty(groups, metrics).reshape(rewards.shape[1:]) if by_text else None
        advantages = self.reward_pipeline.compute_advantages(groups, rewards, penalty)
        rows = make_policy_rows(groups, advantages)
        if self.value_baseline is not None:
            rows = self.add_values(rows, self.value_baseline, metrics)
        if self.routing_scorer is not None:
            routing = self.row_values(rows, self.routing_scorer, every_token=True)
            rows = [replace(row, routing=each) for row, each in zip(rows, routing, strict=True)]
        rows = self.score_rows(rows)
        metrics["rows_trained"] = (len(self.rows_to_read(rows)), sum(map(len, groups)))
        metrics["sampling_seconds"] = (sampling_end - start, 1.0)
        metrics["scoring_seconds"] = (time.perf_counter() - sampling_end, 1.0)
        return RolloutBuffer(number, rows, metrics, sampled)

    def sample_rollout(self, number: int) -> tuple[SampleGroups, SampleGroups, Tensor, dict[str, tuple[float, float]]]:
        """All groups that were sampled, in as many rounds as dynamic sampling takes; those that are trained on, with
        their rewards (R,P,G); and metrics of all."""
        plan = self.plan
        sampled: SampleGroups = []
        kept: SampleGroups = []
        all_rewards, kept_rewards = [], []
        for sampling_round in range(plan.max_sampling_rounds):
            seed = make_rng(plan.seed, "write", number, sampling_round).getrandbits(62)
            groups, rewards = self.sample_groups(self.next_prompts(), seed)
            keep = [True] * len(groups) if plan.max_sampling_rounds == 1 else self.reward_pipeline.is_mixed(rewards)
            sampled += groups
            all_rewards.append(rewards)
            kept += [group for group, stays in zip(groups, keep, strict=True) if stays]
            kept_rewards.append(rewards[:, torch.tensor(keep)])
            if len(kept) >= plan.prompts_per_rollout:
                break
        metrics = sampling_metrics(sampled, torch.cat(all_rewards, dim=1), self.reward_pipeline)
        metrics["sampling_rounds"] = (sampling_round + 1.0, 1.0)
        rewards = torch.cat(kept_rewards, dim=1)[:, : plan.prompts_per_rollout]
        return sampled, kept[: plan.prompts_per_rollout], rewards, metrics

    def sample_groups(self, prompts: Sequence[PolicyPrompt], seed: int) -> tuple[SampleGroups, Tensor]:
        """A group of samples of each prompt, and their rewards (R,P,G); each process samples its part."""
        own_samples = self.sampler(self.policy, prompts, self.plan.num_generations, seed, self.processes.data_shard)
        parts = self.processes.all_gather((own_samples, self.reward_pipeline.compute_rewards(own_samples)))
        return [group for groups, _ in parts for group in groups], torch.cat([rewards for _, rewards in parts], dim=1)

    def next_prompts(self) -> list[PolicyPrompt]:
        """The next prompts that leave room for a completion."""
        prompts: list[PolicyPrompt] = []
        context, taken = self.policy.config.max_position_embeddings, 0
        while len(prompts) < self.plan.prompts_per_rollout:
            prompt = self.prompt_source(self.num_prompts_taken)
            self.num_prompts_taken, taken = self.num_prompts_taken + 1, taken + 1
            if len(prompt.prompt_ids) + self.sampler.max_new_tokens <= context:
                prompts.append(prompt)
            elif taken - len(prompts) >= MAX_REJECTED_PROMPTS:
                raise DataError(
                    f"{MAX_REJECTED_PROMPTS} prompts leave no room for {self.sampler.max_new_tokens} new tokens in the "
                    f"model's context of {context} (the last has {len(prompt.prompt_ids)}): shorten the prompts or "
                    "lower max_new_tokens"
                )
        return prompts

    def score_by_reference(self, rows: Sequence[PolicyRow], metrics: dict[str, tuple[float, float]]) -> list[Any]:
        """The reference's log-probabilities of every completion; the metrics get the divergence from it, per token."""
        reference = self.row_values(rows, self.reference_scorer)
        tokens = float(sum(row.num_policy_tokens for row in rows))
        metrics["kl"] = (sum(map(PolicyRow.divergence_from, rows, reference)), tokens)
        return reference

    def kl_penalty(self, groups: SampleGroups, metrics: dict[str, tuple[float, float]]) -> Tensor:
        """kl_coef times k1, log pi - log pi_ref summed over each completion (one number a sample)."""
        samples = [sample for group in groups for sample in group]
        rows = [make_policy_row(sample, np.zeros(len(sample.completion_ids), np.float32)) for sample in samples]
        reference = self.score_by_reference(rows, metrics)
        k1 = [sum(sample.logprobs) - float(each.sum()) for sample, each in zip(samples, reference, strict=True)]
        return self.plan.kl_coef * torch.tensor(k1, dtype=torch.float64)

    def add_values(
        self, rows: Sequence[PolicyRow], baseline: ValueBaseline, metrics: dict[str, tuple[float, float]]
    ) -> list[PolicyRow]:
        """The rows with values, returns and advantages; KL in the reward is taken off token by token."""
        values, penalties = self.row_values(rows, baseline.scorer), None
        if self.plan.kl_coef:
            reference = self.score_by_reference(rows, metrics)
            penalties = [
                self.plan.kl_coef * (row.sampler_log_probs - each) for row, each in zip(rows, reference, strict=True)
            ]
        return baseline.gae.rows_with_values(rows, values, penalties)

    def score_rows(self, rows: Sequence[PolicyRow]) -> list[PolicyRow]:
        """The same rows in the same order, with the scorers' numbers in those that are read."""
        read = self.rows_to_read(rows)
        fields: list[dict[str, np.ndarray]] = [{} for _ in read]
        for name, scorer in self.scorers.items():
            for row, field, values in zip(read, fields, self.row_values(read, scorer), strict=True):
                field[name] = values[:, : row.length] if values.ndim == 2 else values
        scored = {id(row): replace(row, **field) for row, field in zip(read, fields, strict=True)}  # type: ignore[arg-type]
        return [scored.get(id(row), row) for row in rows]

    def row_values(
        self, rows: Sequence[PolicyRow], scorer: RowScorer | None, *, every_token: bool = False
    ) -> list[np.ndarray]:
        """A scorer's numbers for the tokens of every row, in the rows' order; each process scores its part.
        every_token: for all tokens that are read, not the completion's alone."""
        assert scorer is not None
        own_values: dict[int, np.ndarray] = {}
        device = next(self.policy.parameters()).device
        place = {id(row): number for number, row in enumerate(rows)}
        plan, shard = self.plan, self.processes.data_shard
        groups, shared = plan_micro_batches(rows, plan.max_micro_batch_tokens, share_prompts=plan.share_prompts)
        with torch.no_grad(), eval_mode(self.policy), self.sampler.autocast_context():
            for some in groups[shard.rank :: shard.world_size]:
                batch = collate_policy_rows(some, share_prompts=shared)
                values = scorer(batch.to(device)).float().cpu()
                for row, value, loss_mask in zip(some, values, batch.loss_mask, strict=True):
                    own = value[: row.length].numpy() if every_token else None
                    own_values[place[id(row)]] = (
                        row.spread_over_completion(value[loss_mask].numpy()) if own is None else own
                    )
        gathered = {number: value for part in self.processes.all_gather(own_values) for number, value in part.items()}
        return [gathered[number] for number in range(len(rows))]

    # ------------------------------------------------------------------------------------------ resuming

    def rewind(self) -> None:
        """Undo the last call of `batches`."""
        self.num_prompts_taken, self.last_step, self.rollout = self.before_step

    def state_dict(self) -> dict[str, Any]:
        """The place in the list of prompts and, in the middle of a rollout, its rows."""
        unfinished = None
        if self.rollout is not None and (self.last_step + 1) % self.plan.steps_per_rollout != 0:
            rows = [row_to_json(row) for row in self.rollout.rows]
            unfinished = {"number": self.rollout.number, "rows": rows, "metric_sums": dict(self.rollout.metric_sums)}
        return {"plan": asdict(self.plan), "num_prompts_taken": self.num_prompts_taken, "rollout": unfinished}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        wanted = {
            name: value for name, value in asdict(self.plan).items() if name != "share_prompts"
        }  # no row's content
        changed = [name for name, value in wanted.items() if state_dict["plan"].get(name) != value]
        if changed:
            raise ValueError(f"the checkpoint belongs to other rollouts: {', '.join(changed)} differ")
        self.num_prompts_taken, saved = state_dict["num_prompts_taken"], state_dict["rollout"]
        self.rollout = None
        if saved is not None:
            metrics = {name: (pair[0], pair[1]) for name, pair in saved["metric_sums"].items()}
            self.rollout = RolloutBuffer(saved["number"], [row_from_json(row) for row in saved["rows"]], metrics, [])
