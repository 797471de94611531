"""Shared prefixes: what several rows begin with is read once (the prompt of a group of samples, the question of two
answers).

    plain    p0 p1 p2 a b        shared    prefixes     p0 p1        rows   p2 a b     each continues
             p0 p1 p2 c d                                                   p2 c d     its prefix (prefix_index)

The last token of the prompt is in every row, because the first token of the answer is predicted there. Every row
continues from what a mixer keeps of the prefix (its cache), and the gradients of all rows add up in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from llm_quest.data.batch import pad_with_positions


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
    """The same, where every prompt is read once, and of each row what it adds."""
    prompts = {tuple(prompt) for prompt, _ in rows}
    return len(rows) * (1 + max(more for _, more in rows)) + len(prompts) * (max(map(len, prompts)) - 1)
