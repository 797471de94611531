"""The memory of a recurrent mixer: one state per row, whatever the length of the text.

A state cannot be taken back token by token. `mark(at)` says that nothing below position `at` will be taken back: the
state is photographed when it stands there, and `stand(to)` offers that photograph. Whoever rewinds feeds again from
where all layers can stand (`Cache.rewind`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StateCache:
    """Named tensors (B,...) that each pass replaces, and a photograph of them at the last mark."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.marked: dict[str, Tensor] = {}
        self.marked_at: list[int] | None = None

    def get(self) -> dict[str, Tensor]:
        """What the last pass left; empty before the first."""
        return self.tensors

    def put(self, **tensors: Tensor) -> None:
        """Replace it."""
        self.tensors = tensors

    def mark(self, at: Sequence[int]) -> None:
        """Call it when every row stands at at[b]: the state then is the one that position at[b] finds."""
        self.marked, self.marked_at = dict(self.tensors), list(at)

    def stand(self, to: Sequence[int]) -> list[int]:
        """The mark, or the beginning."""
        marked = self.marked_at or [0] * len(to)
        return [at if at <= asked else 0 for at, asked in zip(marked, to, strict=True)]

    def rewind(self, to: Sequence[int]) -> None:
        if not self.tensors:
            return
        at_mark = torch.tensor(
            [self.marked_at is not None and asked == self.marked_at[row] for row, asked in enumerate(to)]
        )
        for name, now in self.tensors.items():
            photograph = self.marked.get(name, torch.zeros_like(now))
            back = at_mark.to(now.device).view(-1, *[1] * (now.dim() - 1))
            self.tensors[name] = torch.where(back, photograph, torch.zeros_like(now))

    def repeat(self, n: int) -> None:
        self.tensors = {name: kept.repeat_interleave(n, dim=0) for name, kept in self.tensors.items()}
        self.marked = {name: kept.repeat_interleave(n, dim=0) for name, kept in self.marked.items()}
        if self.marked_at is not None:
            self.marked_at = [at for at in self.marked_at for _ in range(n)]

    def keep(self, rows: Tensor) -> None:
        self.tensors = {name: kept[rows.to(kept.device)] for name, kept in self.tensors.items()}
        self.marked = {name: kept[rows.to(kept.device)] for name, kept in self.marked.items()}
        if self.marked_at is not None:
            self.marked_at = [self.marked_at[row] for row in rows.tolist()]

    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self.tensors.values())
