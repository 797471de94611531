"""Who guesses the next tokens: a smaller model, the model's own lookahead modules, or the text itself.

A drafter proposes for each row the tokens that may follow, with the distribution q each was drawn from (None: it was
certain, a point mass). Where it has nothing to say it says nothing (-1), and the target writes alone. `steady` drafters
propose at a place what depends on the text before it alone, wherever the cycle began: then a row's text does not depend
on how far anybody looked ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_quest.generation.sampling import Sampling, inverse_cdf
from llm_quest.models.decoder import Decoder

GoesOn = Callable[[Sequence[list[float]]], bool]
"""Confidences of each row's drafts so far -> draft one more?"""
MOST = 8


class Task(NamedTuple):
    """What is to be guessed. texts: each row's window, its last token not yet read by the target. wanted: at most so
    many tokens of each row. uniforms (B, MOST+1): decide the draws. seen (B,V): what the penalty falls on."""

    texts: Sequence[Sequence[int]]
    wanted: Sequence[int]
    uniforms: Float[Tensor, "B N"]
    seen: Bool[Tensor, "B V"] | None


class Drafts(NamedTuple):
    """tokens: per row, as many as it has. q (B,m,V): what they were drawn from; None: point masses. confidence: per row
    and token, how sure the drafter was."""

    tokens: list[list[int]]
    q: Float[Tensor, "B m V"] | None
    confidence: list[list[float]]

    @property
    def longest(self) -> int:
        return max(map(len, self.tokens))


class Drafter(Protocol):
    """One drafter for one batch of texts. Laws: `propose` changes nothing that a later `settle` does not put right;
    `keep` acts on rows alone."""

    steady: bool
    most: int
    cost: float
    """A draft step in passes of the target, counted and not timed; for what must not depend on the clock."""

    def begin(self, windows: Sequence[Sequence[int]], n: int, capacity: int) -> None:
        """Read the windows but for their last tokens; each serves n rows side by side."""

    def propose(self, task: Task, goes_on: GoesOn) -> Drafts: ...

    def settle(self, hidden: Float[Tensor, "B T D"], texts: Sequence[Sequence[int]], taken: Sequence[int]) -> None:
        """The target read T columns (hidden: what its head saw) and each row became `texts`, by taken[b] tokens."""

    def keep(self, rows: Tensor) -> None: ...


class Draw:
    """How a drafter draws: as the target does, greedily or from the same filtered distribution."""

    def __init__(self, sampling: Sampling, task: Task):
        self.sampling = sampling
        self.task = task
        self.seen = None if task.seen is None else task.seen.clone()
        self.q: list[Tensor] = []
        self.tokens: list[list[int]] = [[] for _ in task.texts]
        self.confidence: list[list[float]] = [[] for _ in task.texts]

    def draw(self, logits: Float[Tensor, "B V"], rows: Sequence[int]) -> Int[Tensor, " B"]:
        """The next token of all rows, noted for these."""
        if self.sampling.greedy:
            logits = self.sampling.penalize(logits.float(), self.seen)
            top, tokens = logits.max(dim=-1)
            sure = (top - logits.logsumexp(dim=-1)).exp()
        else:
            q = self.sampling.distribution(logits, self.seen).exp()
            tokens = inverse_cdf(q, self.task.uniforms[:, len(self.q)])[:, 0]
            sure = q.gather(-1, tokens[:, None])[:, 0]
            self.q.append(q)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        host, sureness = tokens.tolist(), sure.tolist()
        for row in rows:
            self.tokens[row].append(host[row])
            self.confidence[row].append(sureness[row])
        return tokens

    def drafts(self) -> Drafts:
        return Drafts(self.tokens, torch.stack(self.q, dim=1) if self.q else None, self.confidence)


def counted(weights: float, of_weights: float, depth: int, of_depth: int) -> float:
    """What one pass costs in passes of another: half by the weights read, half by the layers called."""
    return (weights / of_weights + depth / of_depth) / 2


def weights(model: Decoder) -> int:
    """What a pass reads, without the modules that only draft."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("lookahead."))
