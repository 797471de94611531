"""Rollouts that count what they cost, so that something else can be given as much.

      sampling   a prompt once for its group, then token after token with a cache
      training   three forward passes' worth of each row that is learned from, its prompt included: what it costs alone

Padding is not counted, and prompts that are read once for their group are not cheaper in this bill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llm_quest.cost.flops import PassCost
from llm_quest.data.policy_batch import PolicyBatch, PolicyRow
from llm_quest.rollouts.rollouts import RolloutLoader
from llm_quest.rollouts.sampler import Sample

TERA = 1e12


class FlopsMeter:
    """flops: so far. num_scorings: how often a sample is scored beside the training itself (a reference, a second
    opinion)."""

    def __init__(self, cost: PassCost, *, num_scorings: int = 0, flops: float = 0.0):
        self.cost, self.num_scorings, self.flops = cost, num_scorings, flops

    def count_sampling(self, groups: Sequence[Sequence[Sample]]) -> None:
        """The groups of a rollout. Those without spread have been sampled too."""
        for group in groups:
            before = len(group[0].prompt_ids)
            self.flops += self.cost.forward(before)
            for sample in group:
                self.flops += self.cost.decoding(before, len(sample.completion_ids))
                self.flops += self.num_scorings * self.cost.forward(before + len(sample.completion_ids) - 1)

    def count_training(self, rows: Sequence[PolicyRow]) -> None:
        self.flops += sum(self.cost.training(row.length) for row in rows)


class MeteredRolloutLoader:
    """Rollouts beside their meter: a feed whose notes hold `teraflops`, all that was spent so far."""

    def __init__(self, rollout_loader: RolloutLoader, meter: FlopsMeter):
        self.rollout_loader, self.meter = rollout_loader, meter

    def batches(self, step: int) -> list[PolicyBatch]:
        loader = self.rollout_loader
        before, batches = loader.rollout, loader.batches(step)
        if loader.rollout is not None and loader.rollout is not before:
            self.meter.count_sampling(loader.rollout.groups)
        self.meter.count_training(loader.rows_to_read(loader.minibatch(step % loader.plan.steps_per_rollout)))
        metric_sums = {**batches[0].metric_sums, "teraflops": (self.meter.flops / TERA, 1.0)}
        return [replace(batches[0], metric_sums=metric_sums), *batches[1:]]

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self.rollout_loader.state_dict(), "flops": self.meter.flops}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.rollout_loader.load_state_dict(state_dict["rollouts"])
        self.meter.flops = state_dict["flops"]
