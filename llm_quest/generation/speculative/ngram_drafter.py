"""Drafting from the text itself: prompt lookup.

Commonly got wrong: the longest match decides, not the latest; drafts of this cycle are a part of the text that is
searched, and forgotten after it."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from llm_quest.generation.speculative.drafters import MAX_DRAFT_TOKENS, DraftRequest, DraftTokens, ShouldContinue


class NgramDrafter:
    """Prompt lookup: proposes what followed the last time the same few tokens occurred in the text. The longest of
    `sizes` that occurred before decides. Free of cost, and right where texts repeat: code, quotations, summaries."""

    context_only = True
    max_draft_tokens = 2 * MAX_DRAFT_TOKENS
    tokens_per_step = 1
    relative_cost = 0.0
    ngram_sizes = (4, 3, 2)

    def prefill(self, windows: Sequence[Sequence[int]], rows_per_window: int, capacity: int) -> None:
        self.tables = [NgramTable(self.ngram_sizes) for window in windows for _ in range(rows_per_window)]

    def propose(self, request: DraftRequest, should_continue: ShouldContinue) -> DraftTokens:
        tokens: list[list[int]] = [[] for _ in request.texts]
        confidence: list[list[float]] = [[] for _ in request.texts]
        going = [row for row, want in enumerate(request.wanted) if want > 0]
        texts = [list(text) for text in request.texts]
        for row in going:
            self.tables[row].add_text(texts[row])
        while going and (not any(tokens) or should_continue(confidence)):
            for row in list(going):
                match = self.tables[row].lookup(texts[row])
                if match is None:
                    going.remove(row)
                    continue
                token, size = match
                tokens[row].append(token)
                confidence[row].append((size - 1) / len(self.ngram_sizes) - 0.05)
                texts[row].append(token)
                self.tables[row].add_draft(texts[row])
                if len(tokens[row]) >= request.wanted[row]:
                    going.remove(row)
        for followers in self.tables:
            followers.draft_followers.clear()
        return DraftTokens(tokens, None, confidence)

    def update(self, hidden: Float[Tensor, "B T D"], texts: Sequence[Sequence[int]], num_taken: Sequence[int]) -> None:
        """Texts are read when drafts are next requested."""

    def keep_rows(self, rows: Tensor) -> None:
        self.tables = [self.tables[row] for row in rows.tolist()]


class NgramTable:
    """For one text: which token last followed every n-gram of it and of the drafts after it."""

    def __init__(self, ngram_sizes: Sequence[int]):
        self.ngram_sizes = ngram_sizes
        self.text_followers: dict[tuple[int, ...], int] = {}
        self.draft_followers: dict[tuple[int, ...], int] = {}
        self.length = 0

    def add_text(self, text: Sequence[int]) -> None:
        """Add what is new since the last time."""
        for end in range(max(self.length, 1), len(text)):
            self.record(self.text_followers, text, end)
        self.length = len(text)

    def add_draft(self, text: Sequence[int]) -> None:
        self.record(self.draft_followers, text, len(text) - 1)

    def record(self, table: dict[tuple[int, ...], int], text: Sequence[int], end: int) -> None:
        for size in self.ngram_sizes:
            if end >= size:
                table[tuple(text[end - size : end])] = text[end]

    def lookup(self, text: Sequence[int]) -> tuple[int, int] | None:
        """The token, and how many tokens matched."""
        for size in self.ngram_sizes:
            key = tuple(text[-size:])
            if len(key) == size and (token := self.draft_followers.get(key, self.text_followers.get(key))) is not None:
                return token, size
        return None
