"""The law of callbacks: a step that was refused has no part in any later one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from llm_quest.contracts import Callback
from llm_quest.data.batch import IGNORE_INDEX, TokenBatch
from llm_quest.models.build import build
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.techniques import QKClip
from llm_quest.techniques.expert_bias import ExpertBiasBalancer
from llm_quest.train.arguments import TrainingArguments
from llm_quest.train.loop import train
from llm_quest.train.optimizers import make_adamw

CALLBACKS: tuple[Callback, ...] = (ExpertBiasBalancer(rate=0.01), QKClip(tau=0.01))


class Script:
    """Steps with these seeds, in order; of the negative ones nothing is learned."""

    def __init__(self, *seeds: int):
        self.seeds = seeds

    def batches(self, step: int) -> Sequence[TokenBatch]:
        seed = self.seeds[step]
        drawn = torch.randint(97 if seed >= 0 else 3, (2, 17), generator=torch.Generator().manual_seed(abs(seed)))
        tokens, targets = drawn[:, :-1], drawn[:, 1:]
        return [TokenBatch(tokens, targets if seed >= 0 else torch.full_like(targets, IGNORE_INDEX))]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda callback: type(callback).__name__)
def test_a_refused_step_leaves_nothing_for_the_next(callback: Callback):
    ends = []
    for seeds in ((1, -2, 3), (1, 3)):
        model = build("deepseek-v3-tiny")
        if isinstance(callback, QKClip):
            callback(model)
        feed, steps = Script(*seeds), TrainingArguments(max_steps=len(seeds))
        result = train(
            NextTokenLoss(model), feed, make_adamw(model, lr=1e-3), lambda step: 1.0, steps, callbacks=[callback]
        )
        assert result.metrics["empty_steps"] == len(seeds) - 2
        ends.append(model.state_dict())
    for name, tensor in ends[1].items():
        assert torch.equal(ends[0][name], tensor), name
