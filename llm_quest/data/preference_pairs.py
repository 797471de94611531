"""PreferenceBatch: one row per question and answer, and the pairs of rows to compare.

    rows 0 1 2 3 4     elements  [best worst] [best middle worst]
    chosen 0 2 2 3     rejected  1 3 4 4       weights 1 1/3 1/3 1/3

K ranked answers are K(K-1)/2 comparisons of one element, whose weights add up to 1 (InstructGPT,
arXiv:2203.02155, section 3.5): each answer is read once. So is the question, where rows share it
(`data/batch.py`): they then begin at its last token, and end before their own, which predicts nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.data.batch import (
    IGNORE_INDEX,
    SharedPrefix,
    TokenBatch,
    full_token_count,
    pad,
    pad_with_shared_prefix,
    shared_token_count,
)
from llm_quest.data.loader import length_grouped_batches
from llm_quest.data.preferences import TokenizedPreference


@dataclass(frozen=True)
class PreferenceBatch:
    """Answers as rows, and which of them are compared. input_ids, targets, position_ids (R,T): as in TokenBatch,
    answers alone learned, padded on the right; the last token of a row, its end, predicts nothing. chosen, rejected
    (M,): rows compared. weights, margins (M,). reference_log_probs (R,): the reference's log-probability of each
    answer, where it is known. prefix: the questions that rows go on from, where they are shared."""

    input_ids: Int[Tensor, "R T"]
    targets: Int[Tensor, "R T"]
    position_ids: Int[Tensor, "R T"]
    chosen: Int[Tensor, " M"]
    rejected: Int[Tensor, " M"]
    weights: Float[Tensor, " M"]
    margins: Float[Tensor, " M"]
    reference_log_probs: Float[Tensor, " R"] | None = None
    prefix: SharedPrefix | None = None
    token_count: int | None = field(default=None, repr=False, compare=False)
    segment_ids: ClassVar[None] = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding, of rows that are read in full. Computed from `position_ids` on the host."""
        return int((self.position_ids >= 0).sum()) if self.token_count is None else self.token_count

    @property
    def full_rows(self) -> TokenBatch:
        """The rows alone, each with its question."""
        if self.prefix is None:
            return TokenBatch(self.input_ids, self.targets, self.position_ids, token_count=self.token_count)
        of, before = self.prefix.prefix_index, self.prefix
        tokens = torch.cat([before.input_ids[of], self.input_ids], dim=1)
        positions = torch.cat([before.position_ids[of], self.position_ids], dim=1)
        targets = torch.cat([torch.full_like(before.input_ids[of], IGNORE_INDEX), self.targets], dim=1)
        return TokenBatch(tokens, targets, positions, token_count=self.token_count)

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """The same batch on another device."""
        tensors = {one.name: getattr(self, one.name) for one in fields(self)}
        moved: dict[str, Any] = {
            name: x.to(device, non_blocking=True) for name, x in tensors.items() if isinstance(x, Tensor)
        }
        moved["prefix"] = None if self.prefix is None else self.prefix.to(device)
        return replace(self, **moved, token_count=self.num_tokens)


def collate_preferences(
    preferences: Sequence[TokenizedPreference],
    reference_log_probs: Sequence[np.ndarray] | None = None,
    *,
    share_prompts: bool = False,
) -> PreferenceBatch:
    """A batch of these elements. reference_log_probs: of each element, a number for each answer. share_prompts: a
    question is read once for all of its answers, where that reads fewer tokens."""
    rows = [
        (preference.prompt.tolist(), answer.tolist()) for preference in preferences for answer in preference.answers
    ]
    unshared, shared_rows = ([(prompt, len(answer) - less) for prompt, answer in rows] for less in (0, 1))
    share_prompts = share_prompts and shared_token_count(shared_rows) < full_token_count(unshared)
    padded = pad_with_shared_prefix(
        [(prompt, answer[:-1] if share_prompts else answer) for prompt, answer in rows], shared=share_prompts
    )
    starts = zip(rows, padded.first_target_columns, strict=True)
    targets = pad(
        [[IGNORE_INDEX] * start + answer for (_, answer), start in starts], IGNORE_INDEX, padded.tokens.shape[1]
    )
    first, pairs = 0, []
    for one in preferences:
        K = len(one.answers)
        pairs += [(first + i, first + j, 2 / (K * (K - 1)), one.margin) for i, j in combinations(range(K), 2)]
        first += K
    better, worse, weights, margins = (torch.tensor(column) for column in zip(*pairs, strict=True))
    known = None if reference_log_probs is None else torch.from_numpy(np.concatenate(reference_log_probs)).float()
    tensors = [torch.from_numpy(column) for column in (padded.tokens, targets, padded.positions)]
    return PreferenceBatch(
        tensors[0], tensors[1], tensors[2], better, worse, weights.float(), margins.float(), known, padded.prefix,
        token_count=sum(len(prompt) + len(answer) for prompt, answer in rows),
    )  # fmt: skip


class PreferenceDataset:
    """A `RowSource` of rated answers, those of like length together. reference_log_probs, share_prompts: see
    `collate_preferences`; the first may be set when it is known."""

    def __init__(self, preferences: Sequence[TokenizedPreference], *, share_prompts: bool = False):
        self.preferences, self.share_prompts = preferences, share_prompts
        self.reference_log_probs: Sequence[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.preferences)

    @cached_property
    def hash(self) -> str:
        """sha256 of all ids and margins."""
        digest = hashlib.sha256()
        for preference in self.preferences:
            digest.update(repr((preference.margin, len(preference.prompt), *map(len, preference.answers))).encode())
            digest.update(b"".join(ids.astype(np.int64).tobytes() for ids in (preference.prompt, *preference.answers)))
        return digest.hexdigest()

    def micro_batches(self, rows: range, micro_batch_size: int, seed: int) -> list[PreferenceBatch]:
        return length_grouped_batches(self, rows, micro_batch_size, seed)

    def fingerprint(self) -> dict[str, Any]:
        return {"loader": "preferences", "data": self.hash}

    def item_length(self, index: int) -> int:
        return self.preferences[index].length

    def collate(self, indices: Sequence[int]) -> PreferenceBatch:
        """A batch of these elements."""
        known = None if self.reference_log_probs is None else [self.reference_log_probs[number] for number in indices]
        return collate_preferences(
            [self.preferences[number] for number in indices], known, share_prompts=self.share_prompts
        )
