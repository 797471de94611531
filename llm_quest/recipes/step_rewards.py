"""Reward models and process reward models as rewards of completions: by any read-out, or step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_quest.objectives.readouts import READOUTS, step_ends, token_scores
from llm_quest.rollouts.sampler import Sample
from llm_quest.techniques.score_head import find_score_head


@dataclass(frozen=True)
class ReadoutReward:
    """Scores completions with any read-out of a reward model's or a process reward model's scores."""

    model: Any
    readout: str

    def __call__(self, group: Sequence[Sample]) -> list[float]:
        found = zip(group, completion_scores(self.model, group), strict=True)
        return [float(READOUTS[self.readout](scores, completion_step_ends(self.model, s))) for s, scores in found]


@dataclass(frozen=True)
class ModelStepRewards:
    """Rewards of steps by a process reward model: for each step of a sample (index of its last token, sigma(score))."""

    model: Any

    def __call__(self, sample: Sample) -> list[tuple[int, float]]:
        (scores,) = completion_scores(self.model, [sample])
        return [(end, float(torch.sigmoid(scores[end]))) for end in completion_step_ends(self.model, sample)]


@torch.no_grad()
def completion_scores(model: Any, samples: Sequence[Sample]) -> list[Tensor]:
    """The scores of every token of each completion, read behind its prompt."""
    found = token_scores(model, [sample.prompt_ids + sample.completion_ids for sample in samples])
    return [scores[len(sample.prompt_ids) :].cpu() for sample, scores in zip(samples, found, strict=True)]


def completion_step_ends(model: Any, sample: Sample) -> list[int]:
    """The index of each step's last token in the completion."""
    head = find_score_head(model)
    return step_ends(sample.completion_ids, 0, head.step_token_ids if head is not None else ())
