"""TokenBatch: rows of tokens with their targets; padding; and prefixes that several rows share.

What several rows begin with is read once (the prompt of a group of samples, the question of two answers):

    plain    p0 p1 p2 a b        shared    prefixes     p0 p1        rows   p2 a b     each continues
             p0 p1 p2 c d                                                   p2 c d     its prefix (prefix_index)

The last token of the prompt is in every row, because the first token of the answer is predicted there. Every row
continues from what a mixer keeps of the prefix (its cache), and the gradients of all rows add up in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

IGNORE_INDEX = -100
SINGLE_LABEL: Final = "single_label_classification"
MULTI_LABEL: Final = "multi_label_classification"
"""transformers' problem types of a classifier: softmax over the labels, or a sigmoid for each."""


def pad(rows: Sequence[Sequence[int] | np.ndarray], value: int, length: int | None = None) -> np.ndarray:
    """Rows (R,T) int64, padded on the right to the longest, or to `length`."""
    padded = np.full((len(rows), max(map(len, rows)) if length is None else length), value, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def pad_with_positions(
    rows: Sequence[Sequence[int] | np.ndarray], starts: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Padded tokens, and positions that are -1 for padding; row r counts from starts[r], or from 0."""
    counts = [np.arange(len(row)) + start for row, start in zip(rows, starts or [0] * len(rows), strict=True)]
    return pad(rows, 0), pad(counts, -1)


@dataclass(frozen=True)
class TokenBatch:
    """tokens (B,T) int64; targets (B,T) int64, already shifted: `targets[b, t]` is to be predicted *at* t, -100 is not
    learned.

    position_ids (B,T): -1 for padding; None means plain rows that count from zero. segment_ids (B,T): which of a packed
    row's documents a token belongs to; None means one document per row. prefix: none is shared (as in `PolicyBatch`).

        tokens      <s>  a   b   <s>  c   <s>        two documents, "a b" and "c", and the beginning of a third
        targets      a   b  </s>  c  </s>  d         the last target is the true next token, in the next row
        positions    0   1   2    0   1    0
        segments     0   0   0    1   1    2
    """

    input_ids: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"] | None = None
    segment_ids: Int[Tensor, "B T"] | None = None
    token_count: int | None = field(default=None, repr=False, compare=False)
    prefix: ClassVar[None] = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding. Computed from `position_ids` on the host, so that reading it there costs no
        device sync."""
        if self.token_count is not None:
            return self.token_count
        return self.input_ids.numel() if self.position_ids is None else int((self.position_ids >= 0).sum())

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device (from pinned memory, without waiting for the copy)."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return TokenBatch(
            move(self.input_ids),
            move(self.targets),
            None if self.position_ids is None else move(self.position_ids),
            None if self.segment_ids is None else move(self.segment_ids),
            self.num_tokens,
        )

    def slice_rows(self, start: int, stop: int) -> TokenBatch:
        """Rows start..stop-1 (views)."""
        return TokenBatch(
            self.input_ids[start:stop],
            self.targets[start:stop],
            None if self.position_ids is None else self.position_ids[start:stop],
            None if self.segment_ids is None else self.segment_ids[start:stop],
        )


@dataclass(frozen=True)
class SharedPrefix:
    """Prefixes of rows. input_ids, position_ids (P,L): padded on the right. prefix_index (R,): the prefix of each
    row. reach: one more than the largest position in any row."""

    input_ids: Int[Tensor, "P L"]
    position_ids: Int[Tensor, "P L"]
    prefix_index: Int[Tensor, " R"]
    reach: int

    def to(self, device: torch.device | str) -> SharedPrefix:
        return SharedPrefix(
            self.input_ids.to(device), self.position_ids.to(device), self.prefix_index.to(device), self.reach
        )


@dataclass(frozen=True)
class PaddedRows:
    """Rows (R,T) on the host, as arrays: tokens and positions (-1 for padding), the column of each row's first
    target, and their prefixes."""

    tokens: np.ndarray
    positions: np.ndarray
    first_target_columns: list[int]
    prefix: SharedPrefix | None


def pad_with_shared_prefix(rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, shared: bool) -> PaddedRows:
    """Rows (prompt, what follows it), padded on the right. shared: prefixes are read once, as far as there is
    something to share; a prompt of a single token is in every row anyway."""
    if not shared or all(len(prompt) == 1 for prompt, _ in rows):
        tokens, positions = pad_with_positions([[*prompt, *rest] for prompt, rest in rows])
        return PaddedRows(tokens, positions, [len(prompt) - 1 for prompt, _ in rows], None)
    known: dict[tuple[int, ...], int] = {}
    of = [known.setdefault(tuple(prompt[:-1]), len(known)) for prompt, _ in rows]
    starts = [len(prompt) - 1 for prompt, _ in rows]
    tokens, positions = pad_with_positions([[prompt[-1], *rest] for prompt, rest in rows], starts)
    before, places = (torch.from_numpy(x) for x in pad_with_positions(list(known)))
    prefix = SharedPrefix(before, places, torch.tensor(of), int(positions.max()) + 1)
    return PaddedRows(tokens, positions, [0] * len(rows), prefix)


def full_token_count(rows: Sequence[tuple[Sequence[int], int]]) -> int:
    """Tokens that a pass reads, padding included, for rows that are read in full: (prompt, number of tokens after
    it)."""
    return len(rows) * max(len(prompt) + more for prompt, more in rows)


def shared_token_count(rows: Sequence[tuple[Sequence[int], int]]) -> int:
    """Tokens that are read where every prompt is read once, and of each row what it adds."""
    prompts = {tuple(prompt) for prompt, _ in rows}
    return len(rows) * (1 + max(more for _, more in rows)) + len(prompts) * (max(map(len, prompts)) - 1)


def split_rows(rows: range, batch_size: int) -> list[range]:
    """Consecutive parts of at most `batch_size` rows."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
