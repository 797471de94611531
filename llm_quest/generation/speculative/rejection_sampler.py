"""Rejection sampling of drafted tokens against the target model's logits.

          x ~ q     accept with probability min(1, p(x) / q(x))     else draw from max(p - q, 0), normalized

Commonly got wrong: p and q must be filtered alike; where rounding leaves max(p - q, 0) empty, p itself is drawn from; a
token's log-probability is p's, never q's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.generation.sampling import SamplingParams, inverse_cdf
from llm_quest.generation.speculative.drafters import DraftTokens


def acceptance_probability(p: Float[Tensor, "*batch"], q: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """min(1, p/q), of a token that was drawn from q, so q > 0."""
    return (p / q).clamp(max=1)


def residual_distribution(p: Float[Tensor, "*batch V"], q: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch V"]:
    """The distribution to draw from after a rejection: max(p - q, 0), normalized. Where p and q are the same, only
    rounding can reject: then p."""
    left = (p - q).clamp(min=0)
    total = left.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, left / total.clamp(min=torch.finfo(p.dtype).tiny), p)


class Acceptance(NamedTuple):
    """Per row the tokens that now follow, and their log-probabilities under p; num_accepted: how many were drafts."""

    tokens: list[list[int]]
    log_probs: list[list[float]]
    num_accepted: list[int]


class RejectionSampler:
    """Accepts or rejects drafts. accept_uniforms, residual_uniforms: (R, steps), one of each for every place of a
    row."""

    def __init__(
        self,
        sampling_params: SamplingParams,
        accept_uniforms: Float[Tensor, "R S"],
        residual_uniforms: Float[Tensor, "R S"],
    ):
        self.sampling_params = sampling_params
        self.accept_uniforms, self.residual_uniforms = accept_uniforms, residual_uniforms

    def __call__(
        self,
        logits: Float[Tensor, "B T V"],
        drafts: DraftTokens,
        rows: Sequence[int],
        num_generated: Sequence[int],
        seen: Tensor | None,
        offsets: Float[Tensor, "B T V"] | None = None,
    ) -> Acceptance:
        """rows, num_generated: which row is in which place of the batch, and how many tokens it has. offsets: what the
        logits processors add; drafts may be made without them, for it is p that decides."""
        width = logits.shape[1]
        if drafts.max_length == 0:
            first = None if offsets is None else offsets[:, 0]
            return self.sample_without_drafts(logits[:, 0], rows, num_generated, seen, first)
        guesses = torch.tensor([(list(part) + [-1] * width)[:width] for part in drafts.tokens], device=logits.device)
        ahead = None if seen is None else penalty_masks(seen, guesses)
        if self.sampling_params.is_greedy:
            return self.verify_greedy(self.sampling_params.apply_penalties(logits.float(), ahead, offsets), guesses)
        places = torch.tensor(list(num_generated), device=logits.device)[:, None] + torch.arange(
            width, device=logits.device
        )
        places = places.clamp(max=self.residual_uniforms.shape[1] - 1)
        u, r = (part[list(rows)].gather(1, places) for part in (self.accept_uniforms, self.residual_uniforms))
        log_p = self.sampling_params.log_probs(logits, ahead, offsets)
        return self.verify_sampled(log_p, guesses, drafts.q, u, r)

    def sample_without_drafts(
        self,
        logits: Float[Tensor, "B V"],
        rows: Sequence[int],
        num_generated: Sequence[int],
        seen: Tensor | None,
        offsets: Tensor | None,
    ) -> Acceptance:
        """Sample one token where nothing was drafted: what `verify_greedy` and `verify_sampled` reduce to."""
        if self.sampling_params.is_greedy:
            logits = self.sampling_params.apply_penalties(logits.float(), seen, offsets)
            top, tokens = logits.max(dim=-1)
            logprobs = top - logits.logsumexp(dim=-1)
        else:
            log_p = self.sampling_params.log_probs(logits, seen, offsets)
            drawn = inverse_cdf(log_p.exp(), self.residual_uniforms[list(rows), list(num_generated)])
            tokens, logprobs = drawn[:, 0], log_p.gather(-1, drawn)[:, 0]
        return Acceptance([[token] for token in tokens.tolist()], [[log] for log in logprobs.tolist()], [0] * len(rows))

    def verify_greedy(self, logits: Float[Tensor, "B T V"], guesses: Int[Tensor, "B T"]) -> Acceptance:
        """Accept drafts while they are the most probable tokens."""
        top, best = logits.max(dim=-1)
        accepted = (guesses == best).int().cumprod(dim=1).sum(dim=1).tolist()
        logprobs = top - logits.logsumexp(dim=-1)
        width = best.shape[1]
        ends = [min(n + 1, width) for n in accepted]
        return Acceptance(
            [row[:end] for row, end in zip(best.tolist(), ends, strict=True)],
            [row[:end] for row, end in zip(logprobs.tolist(), ends, strict=True)],
            accepted,
        )

    def verify_sampled(
        self,
        log_p: Float[Tensor, "B T V"],
        guesses: Int[Tensor, "B T"],
        q: Float[Tensor, "B m V"] | None,
        u: Float[Tensor, "B T"],
        r: Float[Tensor, "B T"],
    ) -> Acceptance:
        """Accept each draft with probability min(1, p/q); after the first rejection draw from the residual
        distribution."""
        width, guessed = guesses.shape[1], guesses >= 0
        q = self.align_draft_probs(q, guesses, log_p)
        at = guesses.clamp(min=0)[..., None]
        log_px = log_p.gather(-1, at)[..., 0]
        qx = torch.where(guessed, q.gather(-1, at)[..., 0], 1)
        accepted = (guessed & (u < acceptance_probability(log_px.exp(), qx))).int().cumprod(dim=1).sum(dim=1)
        end = accepted.clamp(max=width - 1)[:, None]
        last = end[..., None].expand(-1, 1, log_p.shape[-1])
        p_end, q_end = log_p.gather(1, last)[:, 0].exp(), q.gather(1, last)[:, 0]
        weights = torch.where(guessed.gather(1, end), residual_distribution(p_end, q_end), p_end)
        drawn = inverse_cdf(weights, r.gather(1, end)[:, 0])
        log_drawn = log_p.gather(1, last)[:, 0].gather(-1, drawn)
        host = zip(
            guesses.tolist(), log_px.tolist(), drawn.tolist(), log_drawn.tolist(), accepted.tolist(), strict=True
        )
        tokens, logprobs = [], []
        for row, logs, token, log, n in host:
            tokens.append(row[:n] + (token if n < width else []))
            logprobs.append(logs[:n] + (log if n < width else []))
        return Acceptance(tokens, logprobs, accepted.tolist())

    def align_draft_probs(self, q: Tensor | None, guesses: Int[Tensor, "B T"], log_p: Float[Tensor, "B T V"]) -> Tensor:
        """Draft probabilities as distributions. q (B,T,V): point masses as distributions, columns without a draft as
        they are."""
        if q is None:
            return torch.zeros_like(log_p).scatter(-1, guesses.clamp(min=0)[..., None], 1.0)
        missing = guesses.shape[1] - q.shape[1]
        return (
            q[:, : guesses.shape[1]]
            if missing <= 0
            else torch.cat((q, q.new_zeros(q.shape[0], missing, q.shape[2])), 1)
        )


def penalty_masks(seen: Tensor, guesses: Int[Tensor, "B T"]) -> Tensor:
    """(B,T,V): the tokens seen before each column, the drafts before it included."""
    columns, now = [seen], seen
    for guess in guesses[:, :-1].unbind(dim=1):
        now = now.scatter(1, guess.clamp(min=0)[:, None], True) if bool((guess >= 0).all()) else add_seen(now, guess)
        columns.append(now)
    return torch.stack(columns, dim=1)


def add_seen(seen: Tensor, guess: Int[Tensor, " B"]) -> Tensor:
    """The mask with each row's draft added, where it has one."""
    new = seen.scatter(1, guess.clamp(min=0)[:, None], True)
    return torch.where((guess >= 0)[:, None], new, seen)
