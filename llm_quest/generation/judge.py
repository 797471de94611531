"""The judge of speculative decoding: guesses against the target's logits.

      x ~ q     accept with probability min(1, p(x) / q(x))     else draw from max(p - q, 0), normalised

Commonly got wrong: p and q must be filtered alike; where rounding leaves max(p - q, 0) empty, p itself is drawn from; a
token's log-probability is p's, never q's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.generation.drafters import Drafts
from llm_quest.generation.sampling import Sampling, inverse_cdf


def acceptance(p: Float[Tensor, "*batch"], q: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """min(1, p/q), of a token that was drawn from q, so q > 0."""
    return (p / q).clamp(max=1)


def residual(p: Float[Tensor, "*batch V"], q: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch V"]:
    """What is drawn from after a rejection: max(p - q, 0), normalised. Where p and q are the same, nothing can be
    rejected but by rounding: then p."""
    left = (p - q).clamp(min=0)
    total = left.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, left / total.clamp(min=torch.finfo(p.dtype).tiny), p)


class Verdict(NamedTuple):
    """Per row the tokens that now follow, and their log-probabilities under p; accepted: how many were guesses."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    accepted: list[int]


class Judge:
    """Holds the guesses against the target. accept, draw: (R, steps) uniforms, one of each for every place of a row."""

    def __init__(self, sampling: Sampling, accept: Float[Tensor, "R S"], draw: Float[Tensor, "R S"]):
        self.sampling = sampling
        self.accept, self.draw = accept, draw

    def __call__(
        self,
        logits: Float[Tensor, "B T V"],
        drafts: Drafts,
        rows: Sequence[int],
        made: Sequence[int],
        seen: Tensor | None,
    ) -> Verdict:
        """rows, made: which row sits where, and how many tokens it has."""
        width = logits.shape[1]
        if drafts.longest == 0:
            return self.plainly(logits[:, 0], rows, made, seen)
        guesses = torch.tensor([(list(part) + [-1] * width)[:width] for part in drafts.tokens], device=logits.device)
        ahead = None if seen is None else seen_ahead(seen, guesses)
        if self.sampling.greedy:
            return self.greedily(self.sampling.penalize(logits.float(), ahead), guesses)
        places = torch.tensor(list(made), device=logits.device)[:, None] + torch.arange(width, device=logits.device)
        places = places.clamp(max=self.draw.shape[1] - 1)
        u, r = (part[list(rows)].gather(1, places) for part in (self.accept, self.draw))
        log_p = self.sampling.distribution(logits, ahead)
        return self.by_chance(log_p, guesses, drafts.q, u, r)

    def plainly(
        self, logits: Float[Tensor, "B V"], rows: Sequence[int], made: Sequence[int], seen: Tensor | None
    ) -> Verdict:
        """Nothing was guessed, so nothing is judged: what `greedily` and `by_chance` come to."""
        if self.sampling.greedy:
            logits = self.sampling.penalize(logits.float(), seen)
            top, tokens = logits.max(dim=-1)
            logprobs = top - logits.logsumexp(dim=-1)
        else:
            log_p = self.sampling.distribution(logits, seen)
            drawn = inverse_cdf(log_p.exp(), self.draw[list(rows), list(made)])
            tokens, logprobs = drawn[:, 0], log_p.gather(-1, drawn)[:, 0]
        return Verdict([[token] for token in tokens.tolist()], [[log] for log in logprobs.tolist()], [0] * len(rows))

    def greedily(self, logits: Float[Tensor, "B T V"], guesses: Int[Tensor, "B T"]) -> Verdict:
        top, best = logits.max(dim=-1)
        accepted = (guesses == best).int().cumprod(dim=1).sum(dim=1).tolist()
        logprobs = top - logits.logsumexp(dim=-1)
        width = best.shape[1]
        ends = [min(n + 1, width) for n in accepted]
        return Verdict(
            [row[:end] for row, end in zip(best.tolist(), ends, strict=True)],
            [row[:end] for row, end in zip(logprobs.tolist(), ends, strict=True)],
            accepted,
        )

    def by_chance(
        self,
        log_p: Float[Tensor, "B T V"],
        guesses: Int[Tensor, "B T"],
        q: Float[Tensor, "B m V"] | None,
        u: Float[Tensor, "B T"],
        r: Float[Tensor, "B T"],
    ) -> Verdict:
        width, guessed = guesses.shape[1], guesses >= 0
        q = self.aligned(q, guesses, log_p)
        at = guesses.clamp(min=0)[..., None]
        log_px = log_p.gather(-1, at)[..., 0]
        qx = torch.where(guessed, q.gather(-1, at)[..., 0], 1)
        accepted = (guessed & (u < acceptance(log_px.exp(), qx))).int().cumprod(dim=1).sum(dim=1)
        end = accepted.clamp(max=width - 1)[:, None]
        last = end[..., None].expand(-1, 1, log_p.shape[-1])
        p_end, q_end = log_p.gather(1, last)[:, 0].exp(), q.gather(1, last)[:, 0]
        weights = torch.where(guessed.gather(1, end), residual(p_end, q_end), p_end)
        drawn = inverse_cdf(weights, r.gather(1, end)[:, 0])
        log_drawn = log_p.gather(1, last)[:, 0].gather(-1, drawn)
        host = zip(
            guesses.tolist(), log_px.tolist(), drawn.tolist(), log_drawn.tolist(), accepted.tolist(), strict=True
        )
        tokens, logprobs = [], []
        for row, logs, token, log, n in host:
            tokens.append(row[:n] + (token if n < width else []))
            logprobs.append(logs[:n] + (log if n < width else []))
        return Verdict(tokens, logprobs, accepted.tolist())

    def aligned(self, q: Tensor | None, guesses: Int[Tensor, "B T"], log_p: Float[Tensor, "B T V"]) -> Tensor:
        """q (B,T,V): point masses written out, columns without a guess as they come."""
        if q is None:
            return torch.zeros_like(log_p).scatter(-1, guesses.clamp(min=0)[..., None], 1.0)
        missing = guesses.shape[1] - q.shape[1]
        return (
            q[:, : guesses.shape[1]]
            if missing <= 0
            else torch.cat((q, q.new_zeros(q.shape[0], missing, q.shape[2])), 1)
        )


def seen_ahead(seen: Tensor, guesses: Int[Tensor, "B T"]) -> Tensor:
    """(B,T,V): what each column has seen, the guesses before it included."""
    columns, now = [seen], seen
    for guess in guesses[:, :-1].unbind(dim=1):
        now = now.scatter(1, guess.clamp(min=0)[:, None], True) if bool((guess >= 0).all()) else marked(now, guess)
        columns.append(now)
    return torch.stack(columns, dim=1)


def marked(seen: Tensor, guess: Int[Tensor, " B"]) -> Tensor:
    """The same with each row's guess, where it has one."""
    new = seen.scatter(1, guess.clamp(min=0)[:, None], True)
    return torch.where((guess >= 0)[:, None], new, seen)
