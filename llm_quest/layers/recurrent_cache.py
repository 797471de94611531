"""The cache of a recurrent mixer: one state per row, whatever the length of the text.

A state cannot be rewound token by token. There are two ways back. `snapshot(positions)` says that nothing below these
positions will be rewound, and copies the state while every row stands there. With `max_rewind`, the mixer also keeps
the state after each of the last tokens (`history`), so that rejected draft tokens are rewound at no cost.
`latest_rewind(positions)` returns the latest of these places; the caller feeds the tokens from there again
(`Cache.rewind`).

Commonly got wrong: joined caches have histories of unlike length, which are aligned at their ends, since entry -1 is
the last token in each; padding must neither fade nor change a state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from llm_quest.layers.slot_index import concat_rows


class StateSnapshot(NamedTuple):
    """The state before position positions[b] of row b."""

    positions: Int[Tensor, " B"]
    tensors: dict[str, Tensor]


class RecurrentStateCache:
    """Named tensors (B,...) that each pass replaces, their copy at the last snapshot, and the history: states of the
    last tokens, earliest first; empty without max_rewind."""

    def __init__(self, max_rewind: int = 0) -> None:
        self.max_rewind = max_rewind
        self.tensors: dict[str, Tensor] = {}
        self.snapshot_tensors: dict[str, Tensor] = {}
        self.snapshot_positions: list[int] | None = None
        self.history: list[StateSnapshot] = []

    def get(self) -> dict[str, Tensor]:
        """The tensors of the last pass; empty before the first."""
        return self.tensors

    def put(self, **tensors: Tensor) -> None:
        """Replace the tensors."""
        self.tensors = tensors

    def extend_history(self, snapshots: Sequence[StateSnapshot]) -> None:
        """Append to the history, and drop what is more than `max_rewind` tokens back."""
        self.history = [*self.history, *snapshots][-self.max_rewind - 2 :] if self.max_rewind else []

    def snapshot(self, positions: Sequence[int]) -> None:
        """Called while every row stands at positions[b]: the state is the one before that position."""
        self.snapshot_tensors, self.snapshot_positions = dict(self.tensors), list(positions)

    def latest_rewind(self, positions: Sequence[int]) -> list[int]:
        """The latest place in the history, the snapshot, or the beginning."""
        candidates = [[0] * len(positions), *(moment.positions.tolist() for moment in self.history)]
        candidates += [self.snapshot_positions] if self.snapshot_positions is not None else []
        return [
            max(place[row] for place in candidates if place[row] <= position) for row, position in enumerate(positions)
        ]

    def rewind(self, positions: Sequence[int]) -> None:
        if not self.tensors:
            return
        snapshots = [(moment.positions.tolist(), moment.tensors) for moment in self.history]
        snapshots += [(self.snapshot_positions, self.snapshot_tensors)] if self.snapshot_positions is not None else []
        snapshots.append(([0] * len(positions), {}))
        picked = [
            next(number for number, (ends, _) in enumerate(snapshots) if ends[row] == position)
            for row, position in enumerate(positions)
        ]
        self.tensors = {
            name: select_rows([tensors.get(name) for _, tensors in snapshots], picked, now)
            for name, now in self.tensors.items()
        }
        now = next(iter(self.tensors.values()))
        self.history = (
            [StateSnapshot(torch.tensor(list(positions), device=now.device), self.tensors)] if self.max_rewind else []
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_tensors(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
        if self.snapshot_positions is not None:
            self.snapshot_positions = [at for at in self.snapshot_positions for _ in range(repeats)]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map_tensors(lambda tensor: tensor[indices.to(tensor.device)])
        if self.snapshot_positions is not None:
            self.snapshot_positions = [self.snapshot_positions[row] for row in indices.tolist()]

    def batch_concat(self, others: Sequence[Any], order: Sequence[int]) -> None:
        """Join caches by rows; of the histories, as many of the last states as all of them have."""
        parts = [self, *others]
        count = min(len(part.history) for part in parts)
        histories = [part.history[len(part.history) - count :] for part in parts]
        self.history = [concat_snapshots(moments, order) for moments in zip(*histories, strict=True)]
        self.tensors = concat_named([part.tensors for part in parts], order)
        self.snapshot_tensors = concat_named([part.snapshot_tensors for part in parts], order)
        if self.snapshot_positions is not None:
            places = [at for part in parts for at in part.snapshot_positions or []]
            self.snapshot_positions = [places[row] for row in order]

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to every tensor that is kept."""
        self.tensors = {name: function(tensor) for name, tensor in self.tensors.items()}
        self.snapshot_tensors = {name: function(tensor) for name, tensor in self.snapshot_tensors.items()}
        self.history = [
            StateSnapshot(
                function(moment.positions), {name: function(tensor) for name, tensor in moment.tensors.items()}
            )
            for moment in self.history
        ]

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def concat_named(parts: Sequence[dict[str, Tensor]], order: Sequence[int]) -> dict[str, Tensor]:
    """The rows of all parts, name by name."""
    return {name: concat_rows([part[name] for part in parts], order) for name in parts[0]}


def concat_snapshots(moments: Sequence[StateSnapshot], order: Sequence[int]) -> StateSnapshot:
    """The snapshots of several groups of rows as one."""
    positions = concat_rows([moment.positions for moment in moments], order)
    return StateSnapshot(positions, concat_named([moment.tensors for moment in moments], order))


def select_rows(candidates: Sequence[Tensor | None], picked: Sequence[int], like: Tensor) -> Tensor:
    """Row b of the picked[b]-th tensor; zeros where there is none."""
    if len(set(picked)) == 1:
        only = candidates[picked[0]]
        return torch.zeros_like(like) if only is None else only
    rows = [
        torch.zeros_like(like[b]) if (candidate := candidates[at]) is None else candidate[b]
        for b, at in enumerate(picked)
    ]
    return torch.stack(rows)
