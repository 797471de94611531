"""Rollouts that count what they cost, so that something else can be given as much.

      sampling   a prompt once for its group, then token after token with a cache
      training   three forward passes' worth of each row that is learned from, its prompt included: what it costs alone

Padding is not counted, and prompts that are read once for their group are not cheaper in this bill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from llm_quest.data.policy_batch import PolicyBatch, PolicyRow
from llm_quest.models.flops import Cost
from llm_quest.rollouts.rollouts import Rollouts
from llm_quest.rollouts.sample import Sample

TERA = 1e12


class Meter:
    """flops: so far. scorings: how often a sample is scored beside the training itself (a reference, a second
    opinion)."""

    def __init__(self, cost: Cost, *, scorings: int = 0, flops: float = 0.0):
        self.cost, self.scorings, self.flops = cost, scorings, flops

    def sampled(self, groups: Sequence[Sequence[Sample]], rewards: Tensor) -> None:
        """As `Rollouts` calls whoever wants to look. Prompts without news have been sampled too."""
        for group in groups:
            before = len(group[0].prompt)
            self.flops += self.cost.forward(before)
            for sample in group:
                self.flops += self.cost.decoding(before, len(sample.tokens))
                self.flops += self.scorings * self.cost.forward(before + len(sample.tokens) - 1)

    def trained(self, rows: Sequence[PolicyRow]) -> None:
        self.flops += sum(self.cost.training(row.length) for row in rows)


class Metered:
    """Rollouts beside their meter: a feed whose notes hold `teraflops`, all that was spent so far."""

    def __init__(self, rollouts: Rollouts, meter: Meter):
        self.rollouts, self.meter = rollouts, meter

    def at(self, step: int) -> list[PolicyBatch]:
        batches = self.rollouts.at(step)
        self.meter.trained(self.rollouts.read(self.rollouts.minibatch(step % self.rollouts.plan.steps)))
        notes = {**batches[0].notes, "teraflops": (self.meter.flops / TERA, 1.0)}
        return [replace(batches[0], notes=notes), *batches[1:]]

    def bookmark(self) -> dict[str, Any]:
        return {"rollouts": self.rollouts.bookmark(), "flops": self.meter.flops}

    def resume(self, bookmark: Mapping[str, Any]) -> None:
        self.rollouts.resume(bookmark["rollouts"])
        self.meter.flops = bookmark["flops"]
