"""The drafter that is the text itself: prompt look-up."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from llm_quest.generation.drafters import MOST, Drafts, GoesOn, Task


class TextDrafter:
    """The text itself (prompt look-up): what followed the last time the same few tokens stood here. The longest of
    `sizes` that occurred before speaks. Free, and right where texts repeat: code, quotations, summaries."""

    steady = True
    most = 2 * MOST
    stride = 1
    cost = 0.0
    sizes = (4, 3, 2)

    def begin(self, windows: Sequence[Sequence[int]], n: int, capacity: int) -> None:
        self.rows = [Followers(self.sizes) for window in windows for _ in range(n)]

    def propose(self, task: Task, goes_on: GoesOn) -> Drafts:
        tokens: list[list[int]] = [[] for _ in task.texts]
        confidence: list[list[float]] = [[] for _ in task.texts]
        going = [row for row, want in enumerate(task.wanted) if want > 0]
        texts = [list(text) for text in task.texts]
        for row in going:
            self.rows[row].read(texts[row])
        while going and (not any(tokens) or goes_on(confidence)):
            for row in list(going):
                found = self.rows[row].next(texts[row])
                if found is None:
                    going.remove(row)
                    continue
                token, size = found
                tokens[row].append(token)
                confidence[row].append((size - 1) / len(self.sizes) - 0.05)
                texts[row].append(token)
                self.rows[row].guess(texts[row])
                if len(tokens[row]) >= task.wanted[row]:
                    going.remove(row)
        for followers in self.rows:
            followers.guessed.clear()
        return Drafts(tokens, None, confidence)

    def settle(self, hidden: Float[Tensor, "B T D"], texts: Sequence[Sequence[int]], taken: Sequence[int]) -> None:
        """Texts are read when they are next asked for."""

    def keep(self, rows: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows.tolist()]


class Followers:
    """For one text: which token last followed every few tokens of it, and of the guesses made on top."""

    def __init__(self, sizes: Sequence[int]):
        self.sizes = sizes
        self.known: dict[tuple[int, ...], int] = {}
        self.guessed: dict[tuple[int, ...], int] = {}
        self.length = 0

    def read(self, text: Sequence[int]) -> None:
        """What is new since the last time."""
        for end in range(max(self.length, 1), len(text)):
            self.note(self.known, text, end)
        self.length = len(text)

    def guess(self, text: Sequence[int]) -> None:
        self.note(self.guessed, text, len(text) - 1)

    def note(self, table: dict[tuple[int, ...], int], text: Sequence[int], end: int) -> None:
        for size in self.sizes:
            if end >= size:
                table[tuple(text[end - size : end])] = text[end]

    def next(self, text: Sequence[int]) -> tuple[int, int] | None:
        """The token, and how many tokens matched."""
        for size in self.sizes:
            key = tuple(text[-size:])
            if len(key) == size and (found := self.guessed.get(key, self.known.get(key))) is not None:
                return found, size
        return None
