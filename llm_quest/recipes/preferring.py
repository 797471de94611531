"""What `reward` and `dpo` have in common: preferences become pairs of ids, and held-out pairs are judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_quest.data.by_length import ByLengthFeed, all_of
from llm_quest.data.chat import Chat
from llm_quest.data.conversations import held_apart
from llm_quest.data.documents import Ledger
from llm_quest.data.packing import shuffled
from llm_quest.data.pairs import AnswerBatch, Pairs
from llm_quest.data.preferences import Preference, Rated, preferences, rated
from llm_quest.data.questions import preferences as builtin
from llm_quest.data.questions import rows
from llm_quest.recipes.course import micro_rows_of
from llm_quest.recipes.tuning_config import Dpo, Preferred, Reward
from llm_quest.train.parallel import Parallel
from llm_quest.train.state import derive_seed

SAME_LENGTH = 0.1


@dataclass(frozen=True)
class Judged:
    """Pairs to train on and held-out ones, as ids."""

    chat: Chat
    train: Sequence[Rated]
    held: Sequence[Rated]
    ledger: Ledger


def prepared(part: Preferred, chat: Chat, length: int, seed: int) -> Judged:
    """From a source to pairs; what is left out is in the ledger."""
    ledger = Ledger()
    said = preferences(rows(part.source, builtin)[: part.limit], ledger)
    train, held = held_apart(said, part.held_out)
    train = turned_round(train, part.flipped, seed)
    if part.flipped:
        ledger.note(f"{round(part.flipped * len(train))} of the training pairs are turned round on purpose")
    return Judged(chat, rated(chat, train, length, ledger), rated(chat, held, length, ledger), ledger)


def turned_round(pairs: Sequence[Preference], part: float, seed: int) -> list[Preference]:
    """This part of the pairs with the worse answer called the better one."""
    turned = set(shuffled(len(pairs), seed)[: round(part * len(pairs))].tolist())
    return [replace(one, answers=one.answers[::-1]) if n in turned else one for n, one in enumerate(pairs)]


def feed_of(config: Reward | Dpo, judged: Judged, parallel: Parallel) -> ByLengthFeed[Pairs]:
    return ByLengthFeed(
        Pairs(judged.train),
        rows=config.batch.rows,
        micro_rows=micro_rows_of(config.batch, parallel, max(len(one.answers) * one.size for one in judged.train)),
        seed=derive_seed(config.seed, "order"),
        share=parallel.share,
    )


class HeldPairs:
    """Held-out pairs: accuracy, margin, accuracy where both answers are of like length (so that length cannot be the
    reason), and how the reward goes with length.

    rewards(model, batch) -> the reward of each row. loss: -log sigma of the margin."""

    name = "eval"

    def __init__(
        self,
        pairs: Sequence[Rated],
        every: int,
        rewards: Callable[[Any, AnswerBatch], Tensor],
        at_once: int = 16,
    ):
        self.pairs, self.every, self.rewards, self.at_once = Pairs(pairs), every, rewards, at_once

    @torch.no_grad()
    def measure(self, model: Any, step: int) -> Mapping[str, float]:
        device = next(model.parameters()).device
        scored: list[tuple[float, float, int, int]] = []
        for numbers in all_of(self.pairs, self.at_once):
            batch = self.pairs.batch(numbers)
            r = self.rewards(model, batch.to(device)).double().cpu().numpy()
            sizes = [len(answer) for n in numbers for answer in self.pairs.elements[n].answers]
            scored += [
                (r[b], r[w], sizes[b], sizes[w])
                for b, w in zip(batch.better.tolist(), batch.worse.tolist(), strict=True)
            ]
        return judged(np.array(scored))


def judged(scored: np.ndarray) -> dict[str, float]:
    """From rows (reward of the better, of the worse, length of the better, of the worse)."""
    better, worse, long, short = scored.T
    alike = np.abs(long - short) <= SAME_LENGTH * np.maximum(long, short)
    found = {"loss": float(np.logaddexp(0, worse - better).mean()), "accuracy": float((better > worse).mean())}
    found["margin"] = float((better - worse).mean())
    if alike.any():
        found["accuracy_same_length"] = float((better > worse)[alike].mean())
    lengths, rewards = np.concatenate([long, short]), np.concatenate([better, worse])
    if lengths.std() > 0 and rewards.std() > 0:
        found["reward_length_correlation"] = float(np.corrcoef(lengths, rewards)[0, 1])
    found["interval"] = 1.96 * math.sqrt(found["accuracy"] * (1 - found["accuracy"]) / len(scored))
    return found
