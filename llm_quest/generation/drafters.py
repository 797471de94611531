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
    stride: int
    """So many tokens are drafted before the host is asked whether to go on."""
    cost: float
    """A draft step in passes of the target, counted and not timed; for what must not depend on the clock."""

    def begin(self, windows: Sequence[Sequence[int]], n: int, capacity: int) -> None:
        """Read the windows but for their last tokens; each serves n rows side by side."""

    def propose(self, task: Task, goes_on: GoesOn) -> Drafts: ...

    def settle(self, hidden: Float[Tensor, "B T D"], texts: Sequence[Sequence[int]], taken: Sequence[int]) -> None:
        """The target read T columns (hidden: what its head saw) and each row became `texts`, by taken[b] tokens."""

    def keep(self, rows: Tensor) -> None: ...


class Drawn(NamedTuple):
    """One token of every row; how sure the drafter was of it; q, what it was drawn from (None: greedily)."""

    tokens: Int[Tensor, " B"]
    sure: Float[Tensor, " B"]
    q: Float[Tensor, "B V"] | None


def drawn(
    sampling: Sampling, logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"], seen: Bool[Tensor, "B V"] | None
) -> Drawn:
    """As the target draws: greedily, or from the same filtered distribution."""
    if sampling.greedy:
        logits = sampling.penalize(logits.float(), seen)
        top, tokens = logits.max(dim=-1)
        return Drawn(tokens, (top - logits.logsumexp(dim=-1)).exp(), None)
    q = sampling.distribution(logits, seen).exp()
    tokens = inverse_cdf(q, uniforms)
    return Drawn(tokens[:, 0], q.gather(-1, tokens)[:, 0], q)


def together(made: Sequence[Drawn]) -> tuple[Int[Tensor, "B c"], Float[Tensor, "B c"], Float[Tensor, "B c V"] | None]:
    """One column for each."""
    q = [each.q for each in made if each.q is not None]
    tokens, sure = (torch.stack(part, dim=1) for part in ([d.tokens for d in made], [d.sure for d in made]))
    return tokens, sure, torch.stack(q, dim=1) if q else None


class Notes:
    """What was drawn so far, on the host, and what the penalty falls on by now."""

    def __init__(self, task: Task):
        self.task = task
        self.seen = None if task.seen is None else task.seen.clone()
        self.q: list[Tensor] = []
        self.tokens: list[list[int]] = [[] for _ in task.texts]
        self.confidence: list[list[float]] = [[] for _ in task.texts]

    @property
    def steps(self) -> int:
        """How many tokens the rows that draw have."""
        return max(map(len, self.tokens))

    def add(
        self,
        tokens: Int[Tensor, "B c"],
        sure: Float[Tensor, "B c"],
        q: Float[Tensor, "B c V"] | None,
        wanted: Sequence[int],
    ) -> list[list[int]]:
        """Note these for the rows that still want some, and return them all."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens, True)
        if q is not None:
            self.q.append(q)
        host = tokens.tolist()
        for row, (new, sureness) in enumerate(zip(host, sure.tolist(), strict=True)):
            space = max(wanted[row] - len(self.tokens[row]), 0)
            self.tokens[row] += new[:space]
            self.confidence[row] += sureness[:space]
        return host

    def drafts(self) -> Drafts:
        return Drafts(self.tokens, torch.cat(self.q, dim=1) if self.q else None, self.confidence)


def counted(weights: float, of_weights: float, depth: int, of_depth: int, *, compiled: bool = False) -> float:
    """What one pass costs in passes of another: half by the weights read, half by the layers called; compiled, by the
    weights alone."""
    return weights / of_weights if compiled else (weights / of_weights + depth / of_depth) / 2


def weights(model: Decoder) -> int:
    """What a pass reads, without the modules that only draft."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("lookahead."))
