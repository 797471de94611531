"""What `reward` and `dpo` have in common: preferences become pairs of ids, and held-out pairs are judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from llm_quest.data.builtin_qa import builtin_preferences as builtin
from llm_quest.data.builtin_qa import load_records
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.conversations import split_by_prompt
from llm_quest.data.documents import DropReport
from llm_quest.data.loader import ShardedLoader, length_grouped_indices, shuffle_indices
from llm_quest.data.preference_pairs import PreferenceBatch, PreferenceDataset
from llm_quest.data.preferences import Preference, TokenizedPreference, read_preferences, tokenize_preferences
from llm_quest.recipes.finetuning import ConversationDataConfig, PairBatchedConfig
from llm_quest.recipes.run import micro_batch_rows
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.state_dict import derive_seed

SIMILAR_LENGTH_TOLERANCE = 0.1


@dataclass(frozen=True)
class PreferenceData:
    """Pairs to train on and held-out ones, as ids."""

    chat: ChatTemplate
    train: Sequence[TokenizedPreference]
    held_out: Sequence[TokenizedPreference]
    drop_report: DropReport


class PreferenceDataConfig(ConversationDataConfig):
    """Preferences: a question, the better answer and the worse one."""

    label_flip_fraction: float = Field(
        default=0.0, ge=0, lt=0.5, description="turn round this part of the training pairs, to see what noise does"
    )


def prepare_preferences(config: PreferenceDataConfig, chat: ChatTemplate, length: int, seed: int) -> PreferenceData:
    """From a source to pairs; what is left out is in the ledger."""
    drop_report = DropReport()
    pairs = read_preferences(load_records(config.source, builtin)[: config.max_samples], drop_report)
    train, held = split_by_prompt(pairs, config.held_out)
    train = flip_labels(train, config.label_flip_fraction, seed)
    if config.label_flip_fraction:
        drop_report.note(
            f"{round(config.label_flip_fraction * len(train))} of the training pairs are turned round on purpose"
        )
    return PreferenceData(
        chat,
        tokenize_preferences(chat, train, length, drop_report),
        tokenize_preferences(chat, held, length, drop_report),
        drop_report,
    )


def flip_labels(pairs: Sequence[Preference], fraction: float, seed: int) -> list[Preference]:
    """This part of the pairs with the worse answer called the better one."""
    flipped = set(shuffle_indices(len(pairs), seed)[: round(fraction * len(pairs))].tolist())
    return [replace(one, answers=one.answers[::-1]) if n in flipped else one for n, one in enumerate(pairs)]


def pairs_loader(
    config: PairBatchedConfig, data: PreferenceData, parallel: DistributedContext
) -> ShardedLoader[PreferenceDataset]:
    return ShardedLoader(
        PreferenceDataset(data.train),
        batch_size=config.batch_size,
        micro_batch_size=micro_batch_rows(
            config.batch_size,
            config.micro_batch_size,
            parallel,
            max(len(one.answers) * one.length for one in data.train),
        ),
        seed=derive_seed(config.seed, "order"),
        shard=parallel.data_shard,
    )


class PairsEvaluator:
    """Held-out pairs: accuracy, margin, accuracy where both answers are of like length (so that length cannot be the
    reason), and how the reward goes with length.

    rewards(model, batch) -> the reward of each row. loss: -log sigma of the margin."""

    name = "eval"

    def __init__(
        self,
        pairs: Sequence[TokenizedPreference],
        every: int,
        rewards: Callable[[Any, PreferenceBatch], Tensor],
        batch_size: int = 16,
    ):
        self.pairs, self.interval, self.rewards, self.at_once = PreferenceDataset(pairs), every, rewards, batch_size

    @torch.no_grad()
    def evaluate(self, model: Any, step: int) -> Mapping[str, float]:
        device = next(model.parameters()).device
        scored: list[tuple[float, float, int, int]] = []
        for numbers in length_grouped_indices(self.pairs, self.at_once):
            batch = self.pairs.collate(numbers)
            r = self.rewards(model, batch.to(device)).double().cpu().numpy()
            sizes = [len(answer) for n in numbers for answer in self.pairs.preferences[n].answers]
            scored += [
                (r[b], r[w], sizes[b], sizes[w])
                for b, w in zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)
            ]
        return preference_metrics(np.array(scored))


def preference_metrics(scored: np.ndarray) -> dict[str, float]:
    """From rows (reward of the better, of the worse, length of the better, of the worse)."""
    better, worse, long, short = scored.T
    alike = np.abs(long - short) <= SIMILAR_LENGTH_TOLERANCE * np.maximum(long, short)
    found = {"loss": float(np.logaddexp(0, worse - better).mean()), "accuracy": float((better > worse).mean())}
    found["margin"] = float((better - worse).mean())
    if alike.any():
        found["accuracy_same_length"] = float((better > worse)[alike].mean())
    lengths, rewards = np.concatenate([long, short]), np.concatenate([better, worse])
    if lengths.std() > 0 and rewards.std() > 0:
        found["reward_length_correlation"] = float(np.corrcoef(lengths, rewards)[0, 1])
    found["interval"] = 1.96 * math.sqrt(found["accuracy"] * (1 - found["accuracy"]) / len(scored))
    return found
