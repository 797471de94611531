"""The memory of a recurrent mixer: one state per row, whatever the length of the text.

A state cannot be taken back token by token. There are two ways back. `mark(at)` says that nothing below position `at`
will be taken back: the state is photographed when it stands there. And with `slack` the mixer leaves the state after
each of the last tokens (a trail), so that a draft's rejected end is taken back at no cost. `stand(to)` offers the
latest of these places; whoever rewinds feeds again from where all layers can stand (`Cache.rewind`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Moment(NamedTuple):
    """The state that position ends[b] of row b finds."""

    ends: Int[Tensor, " B"]
    tensors: dict[str, Tensor]


class StateCache:
    """Named tensors (B,...) that each pass replaces, a photograph of them at the last mark, and the trail: moments of
    the last passes, earliest first; empty without slack."""

    def __init__(self, slack: int = 0) -> None:
        self.slack = slack
        self.tensors: dict[str, Tensor] = {}
        self.marked: dict[str, Tensor] = {}
        self.marked_at: list[int] | None = None
        self.trail: list[Moment] = []

    def get(self) -> dict[str, Tensor]:
        """What the last pass left; empty before the first."""
        return self.tensors

    def put(self, **tensors: Tensor) -> None:
        """Replace it."""
        self.tensors = tensors

    def walked(self, moments: Sequence[Moment]) -> None:
        """The trail grows by these, and forgets what is more than `slack` tokens back."""
        self.trail = [*self.trail, *moments][-self.slack - 2 :] if self.slack else []

    def mark(self, at: Sequence[int]) -> None:
        """Call it when every row stands at at[b]: the state then is the one that position at[b] finds."""
        self.marked, self.marked_at = dict(self.tensors), list(at)

    def stand(self, to: Sequence[int]) -> list[int]:
        """The latest place on the trail, the mark, or the beginning."""
        places = [[0] * len(to), *(moment.ends.tolist() for moment in self.trail)]
        places += [self.marked_at] if self.marked_at is not None else []
        return [max(place[row] for place in places if place[row] <= asked) for row, asked in enumerate(to)]

    def rewind(self, to: Sequence[int]) -> None:
        if not self.tensors:
            return
        moments = [(moment.ends.tolist(), moment.tensors) for moment in self.trail]
        moments += [(self.marked_at, self.marked)] if self.marked_at is not None else []
        moments.append(([0] * len(to), {}))
        picked = [
            next(number for number, (ends, _) in enumerate(moments) if ends[row] == asked)
            for row, asked in enumerate(to)
        ]
        self.tensors = {
            name: chosen([tensors.get(name) for _, tensors in moments], picked, now)
            for name, now in self.tensors.items()
        }
        now = next(iter(self.tensors.values()))
        self.trail = [Moment(torch.tensor(list(to), device=now.device), self.tensors)] if self.slack else []

    def repeat(self, n: int) -> None:
        self.each(lambda kept: kept.repeat_interleave(n, dim=0))
        if self.marked_at is not None:
            self.marked_at = [at for at in self.marked_at for _ in range(n)]

    def keep(self, rows: Tensor) -> None:
        self.each(lambda kept: kept[rows.to(kept.device)])
        if self.marked_at is not None:
            self.marked_at = [self.marked_at[row] for row in rows.tolist()]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """The same change to all that is kept."""
        self.tensors = {name: change(kept) for name, kept in self.tensors.items()}
        self.marked = {name: change(kept) for name, kept in self.marked.items()}
        self.trail = [
            Moment(change(moment.ends), {name: change(kept) for name, kept in moment.tensors.items()})
            for moment in self.trail
        ]

    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self.tensors.values())


def chosen(kept: Sequence[Tensor | None], picked: Sequence[int], like: Tensor) -> Tensor:
    """Row b of the picked[b]-th tensor; zeros where there is none."""
    if len(set(picked)) == 1:
        only = kept[picked[0]]
        return torch.zeros_like(like) if only is None else only
    rows = [torch.zeros_like(like[b]) if (found := kept[at]) is None else found[b] for b, at in enumerate(picked)]
    return torch.stack(rows)
