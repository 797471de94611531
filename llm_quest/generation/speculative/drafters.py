"""Drafters propose the next tokens: a smaller model, the model's own multi-token prediction modules, or the text
itself.

A drafter proposes for each row the tokens that may follow, with the distribution q each was drawn from (None: a point
mass). Where it has no proposal it gives none, and the target model samples alone. A drafter that is `context_only`
proposes at a place what depends on the text before it alone, wherever the cycle began: then a row's text does not
depend on the draft length.

Commonly got wrong: a draft is drawn from the same filtered distribution as the target's tokens, or it is rejected more
often; its own earlier drafts count as seen for the repetition penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_quest.generation.sampling import SamplingParams, inverse_cdf
from llm_quest.models.decoder import Decoder

ShouldContinue = Callable[[Sequence[list[float]]], bool]
"""Confidences of each row's drafts so far -> draft one more?"""
MAX_DRAFT_TOKENS = 8


class DraftRequest(NamedTuple):
    """What to draft. texts: each row's window, its last token not yet read by the target model. wanted: at most so many
    tokens of each row. uniforms (B, MAX_DRAFT_TOKENS+1): decide the draws. seen (B,V): the tokens that the penalty
    applies to."""

    texts: Sequence[Sequence[int]]
    wanted: Sequence[int]
    uniforms: Float[Tensor, "B N"]
    seen: Bool[Tensor, "B V"] | None


class DraftTokens(NamedTuple):
    """Drafted tokens. tokens: per row, as many as it has. q (B,m,V): the distributions they were drawn from; None:
    point masses. confidence: per row and token, how sure the drafter was."""

    tokens: list[list[int]]
    q: Float[Tensor, "B m V"] | None
    confidence: list[list[float]]

    @property
    def max_length(self) -> int:
        return max(map(len, self.tokens))


class Drafter(Protocol):
    """A drafter for one batch of texts. Laws: `propose` changes nothing that a later `update` does not restore;
    `keep_rows` acts on rows alone."""

    context_only: bool
    max_draft_tokens: int
    tokens_per_step: int
    """So many tokens are drafted before the host is asked whether to go on."""
    relative_cost: float
    """A draft step in passes of the target, counted and not timed; for what must not depend on the clock."""

    def prefill(self, windows: Sequence[Sequence[int]], rows_per_window: int, capacity: int) -> None:
        """Read the windows but for their last tokens; each serves n consecutive rows."""

    def propose(self, request: DraftRequest, should_continue: ShouldContinue) -> DraftTokens: ...

    def update(self, hidden: Float[Tensor, "B T D"], texts: Sequence[Sequence[int]], num_taken: Sequence[int]) -> None:
        """The target model has read T columns (hidden: the inputs of its head), and each row has become `texts`, by
        taken[b] tokens."""

    def keep_rows(self, rows: Tensor) -> None: ...


class DraftSample(NamedTuple):
    """One drafted token of every row; the drafter's confidence in it; q, the distribution it was drawn from (None:
    greedily)."""

    tokens: Int[Tensor, " B"]
    confidence: Float[Tensor, " B"]
    q: Float[Tensor, "B V"] | None


def sample_draft(
    sampling_params: SamplingParams,
    logits: Float[Tensor, "B V"],
    uniforms: Float[Tensor, " B"],
    seen: Bool[Tensor, "B V"] | None,
) -> DraftSample:
    """Sample as the target model does: greedily, or from the same filtered distribution."""
    if sampling_params.is_greedy:
        logits = sampling_params.apply_penalties(logits.float(), seen)
        top, tokens = logits.max(dim=-1)
        return DraftSample(tokens, (top - logits.logsumexp(dim=-1)).exp(), None)
    q = sampling_params.log_probs(logits, seen).exp()
    tokens = inverse_cdf(q, uniforms)
    return DraftSample(tokens[:, 0], q.gather(-1, tokens)[:, 0], q)


def stack_draft_samples(
    samples: Sequence[DraftSample],
) -> tuple[Int[Tensor, "B c"], Float[Tensor, "B c"], Float[Tensor, "B c V"] | None]:
    """Stack samples, one column for each."""
    q = [each.q for each in samples if each.q is not None]
    tokens, sure = (torch.stack(part, dim=1) for part in ([d.tokens for d in samples], [d.confidence for d in samples]))
    return tokens, sure, torch.stack(q, dim=1) if q else None


class DraftBuffer:
    """The tokens drafted so far, on the host, and the tokens that the penalty applies to by now."""

    def __init__(self, request: DraftRequest):
        self.request = request
        self.seen = None if request.seen is None else request.seen.clone()
        self.q: list[Tensor] = []
        self.tokens: list[list[int]] = [[] for _ in request.texts]
        self.confidence: list[list[float]] = [[] for _ in request.texts]

    @property
    def num_drafted(self) -> int:
        """The most tokens that a row has."""
        return max(map(len, self.tokens))

    def append(
        self,
        tokens: Int[Tensor, "B c"],
        confidence: Float[Tensor, "B c"],
        q: Float[Tensor, "B c V"] | None,
        wanted: Sequence[int],
    ) -> list[list[int]]:
        """Append these tokens in the rows that still want some; returns them all."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens, True)
        if q is not None:
            self.q.append(q)
        host = tokens.tolist()
        for row, (new, sureness) in enumerate(zip(host, confidence.tolist(), strict=True)):
            space = max(wanted[row] - len(self.tokens[row]), 0)
            self.tokens[row] += new[:space]
            self.confidence[row] += sureness[:space]
        return host

    def to_drafts(self) -> DraftTokens:
        return DraftTokens(self.tokens, torch.cat(self.q, dim=1) if self.q else None, self.confidence)


def relative_pass_cost(
    num_weights: float, target_num_weights: float, depth: int, target_depth: int, *, compiled: bool = False
) -> float:
    """The cost of a pass in passes of another model: half by the weights read, half by the layers called; compiled, by
    the weights alone."""
    return (
        num_weights / target_num_weights if compiled else (num_weights / target_num_weights + depth / target_depth) / 2
    )


def count_weights(model: Decoder) -> int:
    """The weights that a pass reads, without the modules that only draft."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp_modules."))
