"""Speculative decoding (Leviathan, Kalman & Matias 2022, arXiv:2211.17192): a drafter guesses, the model checks all
guesses in one pass, and the text has exactly the distribution the model alone would give it.

      x ~ q     accept with probability min(1, p(x) / q(x))     else draw from max(p - q, 0), normalised

Greedy: a guess is accepted while it is the most probable token, so the text is the plain one token for token.

      known    a b c                      the target reads    c  d' e' f'
      guessed        d' e' f' g'          and judges          d' e' f' g'

Differs: the paper draws one more token from p when all guesses are accepted. Here a steady drafter guesses that token
too, and it is judged like the others. The law is the same, and the token at a place depends on the text before it and
on the seed alone, not on where a cycle began or how far it looked: so a row writes the same text whoever its neighbours
are, and however the lookahead adapts.

Commonly got wrong: p and q must be filtered alike; an eos may stand anywhere among the accepted; where rounding leaves
max(p - q, 0) empty, p itself is drawn from; a token's log-probability is p's, never q's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.generation.drafters import (
    Drafter,
    Drafts,
    LookaheadDrafter,
    ModelDrafter,
    Task,
    TextDrafter,
)
from llm_quest.generation.pace import Pace, Tally, least_acceptance
from llm_quest.generation.sampling import Sampling, inverse_cdf, seen_tokens
from llm_quest.generation.until import Made, Row
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope

Draft = Decoder | str
"""A smaller model, or "mtp" or "ngram"."""
EVIDENCE = 8
"""A sampled row judges its drafter once, by its first tokens: the clock and the neighbours, which could change its
text, are not asked."""


def acceptance(p: Float[Tensor, "*batch"], q: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """min(1, p/q), of a token that was drawn from q, so q > 0."""
    return (p / q).clamp(max=1)


def residual(p: Float[Tensor, "*batch V"], q: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch V"]:
    """What is drawn from after a rejection: max(p - q, 0), normalised. Where p and q are the same, nothing can be
    rejected but by rounding: then p."""
    left = (p - q).clamp(min=0)
    total = left.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, left / total.clamp(min=torch.finfo(p.dtype).tiny), p)


def drafter_of(draft: Draft, model: Decoder, sampling: Sampling) -> Drafter:
    """What `draft=` means."""
    if isinstance(draft, Decoder):
        return ModelDrafter(draft, model, sampling)
    if draft == "mtp":
        return LookaheadDrafter(model, sampling)
    if draft == "ngram":
        return TextDrafter()
    raise UsageError(f"draft is {draft!r}: give a smaller model, 'mtp' (the model's own modules) or 'ngram'")


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
        guesses = torch.tensor([(list(part) + [-1] * width)[:width] for part in drafts.tokens], device=logits.device)
        ahead = None if seen is None else seen_ahead(seen, guesses)
        if self.sampling.greedy:
            return self.greedily(self.sampling.penalize(logits.float(), ahead), guesses)
        places = torch.tensor(list(made), device=logits.device)[:, None] + torch.arange(width, device=logits.device)
        places = places.clamp(max=self.draw.shape[1] - 1)
        u, r = (part[list(rows)].gather(1, places) for part in (self.accept, self.draw))
        log_p = self.sampling.distribution(logits, ahead)
        return self.by_chance(log_p, guesses, drafts.q, u, r)

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


class Target:
    """The model's side: its cache, which rows sit in it, and one pass over what is unread and guessed."""

    def __init__(self, model: Decoder):
        self.model = model
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def begin(self, windows: Sequence[Sequence[int]], n: int, capacity: int, slack: int) -> Tensor:
        """Read all but each window's last token, padding at the end; what the head would read."""
        self.cache = self.model.new_cache(len(windows), capacity, slack)
        self.stands = [len(window) - 1 for window in windows for _ in range(n)]
        longest = max(len(window) for window in windows) - 1
        if longest == 0:
            hidden = torch.zeros(len(windows), 0, self.model.config.width, device=self.device)
        else:
            hidden = self.hidden([window[:-1] for window in windows], [0] * len(windows), longest)
        if n > 1:
            self.cache.repeat(n)
            hidden = hidden.repeat_interleave(n, dim=0)
        return hidden

    def hidden(self, fed: Sequence[Sequence[int]], starts: Sequence[int], width: int) -> Float[Tensor, "B T D"]:
        tokens = torch.tensor([list(part) + [0] * (width - len(part)) for part in fed])
        positions = [
            [*range(start, start + len(part)), *[-1] * (width - len(part))]
            for start, part in zip(starts, fed, strict=True)
        ]
        reach = max(start + len(part) for start, part in zip(starts, fed, strict=True) if part)
        alike = len(set(starts)) == 1 and all(len(part) == width for part in fed)
        scope = Scope(torch.tensor(positions).to(self.device), cache=self.cache, reach=reach, plain=alike)
        return self.model.hidden(tokens.to(self.device), scope)

    @torch.inference_mode()
    def read(self, texts: Sequence[Sequence[int]], guesses: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """What the head reads, and the logits, at each row's last token and the guesses behind it."""
        fed = [list(text[stand:]) + list(guess) for text, stand, guess in zip(texts, self.stands, guesses, strict=True)]
        behind = [len(text) - stand for text, stand in zip(texts, self.stands, strict=True)]
        width = max(map(len, fed))
        hidden = self.hidden(fed, self.stands, width)
        self.stands = [stand + len(part) for stand, part in zip(self.stands, fed, strict=True)]
        if max(behind) > 1:  # a cache that went further back than asked: the tokens read again are not judged
            index = torch.tensor(behind, device=self.device)[:, None] - 1
            index = (index + torch.arange(width, device=self.device)).clamp(max=width - 1)
            hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))[:, : max(map(len, guesses)) + 1]
        return hidden, self.model.head(hidden)

    @torch.inference_mode()
    def settle(self, texts: Sequence[Sequence[int]]) -> None:
        """Each row's last token is unread, and what was guessed wrongly is taken back."""
        to = [min(stand, len(text) - 1) for stand, text in zip(self.stands, texts, strict=True)]
        if to != self.stands:
            self.stands = self.cache.rewind(to)

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.stands = [self.stands[row] for row in rows.tolist()]


class Speculation:
    """A batch of texts being written with a drafter. `tally` counts what happened."""

    def __init__(
        self,
        model: Decoder,
        drafter: Drafter,
        sampling: Sampling,
        uniforms: tuple[Float[Tensor, "R S"], Float[Tensor, "R S"], Float[Tensor, "R S"]],
        tally: Tally,
    ):
        self.model, self.drafter, self.sampling, self.tally = model, drafter, sampling, tally
        self.target = Target(model)
        self.guess_uniforms, accept, draw = uniforms
        self.judge = Judge(sampling, accept, draw)
        self.pace = Pace(drafter.most, timed=sampling.greedy)
        self.free = drafter.steady or sampling.greedy  # may lookaheads differ without changing the text?
        self.spare = 0 if drafter.steady and not sampling.greedy else 1  # columns read beyond the guesses
        self.least = least_acceptance(drafter.cost)
        self.tried: dict[int, list[int]] = {}

    def begin(self, rows: Sequence[Row], n: int) -> None:
        """Read what the rows see now, with room for all that may follow."""
        self.rows = list(rows)
        windows = [row.window for row in rows[::n]]
        capacity = max(min(row.context, len(row.window) + row.tokens_left) for row in rows)
        hidden = self.target.begin(windows, n, capacity, self.drafter.most + 1)
        self.drafter.begin(windows, n, capacity)
        self.drafter.settle(hidden, self.texts(), [len(row.window) - 1 for row in rows])

    def seen_now(self) -> Tensor | None:
        """What the repetition penalty falls on."""
        if self.sampling.repetition_penalty == 1:
            return None
        return seen_tokens([row.history for row in self.rows], self.model.config.vocab, self.target.device)

    def texts(self) -> list[list[int]]:
        return [row.window for row in self.rows]

    def cycle(self) -> list[tuple[Row, list[int], list[float]]]:
        """Draft, read, judge: what now follows in each row."""
        started = time.perf_counter()
        self.seen = self.seen_now()
        texts, room = self.texts(), [self.room(row) for row in self.rows]
        drafts = self.drafted(texts, room)
        drafted = time.perf_counter()
        width = max(1, drafts.longest + self.spare)
        guesses = [part[: min(width, space) - 1] for part, space in zip(drafts.tokens, room, strict=True)]
        hidden, logits = self.target.read(texts, guesses)
        verdict = self.judge(
            logits[:, :width], drafts, [row.number for row in self.rows], [row.made for row in self.rows], self.seen
        )
        if any(math.isnan(each) for row in verdict.logprobs for each in row):
            raise ValueError("the model's logits are not finite, so no token can be drawn: look for NaN in its weights")
        self.hidden = hidden
        steps, written = drafts.longest, sum(map(len, verdict.tokens))
        self.pace.note(width, steps, written, time.perf_counter() - drafted, drafted - started)
        self.count(drafts, verdict)
        taken = zip(self.rows, verdict.tokens, verdict.logprobs, room, strict=True)
        return [(row, tokens[:space], logprobs[:space]) for row, tokens, logprobs, space in taken]

    def room(self, row: Row) -> int:
        """How many tokens this row can take before it ends, its window slides, or its drafter is judged."""
        places = row.context - len(row.window) + (row.until.beyond == "slide")
        trial = EVIDENCE - row.made if not self.pace.timed and row.made < EVIDENCE else places
        return min(row.tokens_left, places, trial)

    def drafted(self, texts: Sequence[Sequence[int]], room: Sequence[int]) -> Drafts:
        """The guesses of rows whose drafter is worth asking."""
        paced = self.pace.begin(len(self.rows))
        most = paced if self.free else self.drafter.most
        wanted = [
            0 if self.gave_up(row) else max(min(most, space - self.spare), 0)
            for row, space in zip(self.rows, room, strict=True)
        ]
        if not any(wanted):
            return Drafts([[] for _ in texts], None, [[] for _ in texts])
        places = torch.tensor([row.made for row in self.rows])[:, None] + torch.arange(self.drafter.most)
        places = places.clamp(max=self.guess_uniforms.shape[1] - 1)
        uniforms = self.guess_uniforms[[row.number for row in self.rows]]
        task = Task(texts, wanted, uniforms.gather(1, places.to(uniforms.device)), self.seen)
        return self.drafter.propose(task, self.goes_on)

    def goes_on(self, confidence: Sequence[Sequence[float]]) -> bool:
        if not self.free:
            return True
        chances = [math.prod(self.pace.chance(each) for each in row) for row in confidence if row]
        return self.pace.goes_on(chances)

    def gave_up(self, row: Row) -> bool:
        """Has this row's own beginning shown that drafts do not pay? Where the clock may decide, it does instead."""
        tested, accepted = self.tried.get(row.number, (0, 0))
        return not self.pace.timed and row.made >= EVIDENCE and (accepted + 1) / (tested + 2) < self.least

    def count(self, drafts: Drafts, verdict: Verdict) -> None:
        self.tally.passes += 1
        self.tally.plain += drafts.longest == 0
        self.tally.tokens += sum(map(len, verdict.tokens))
        for row, sure, tokens, accepted in zip(
            self.rows, drafts.confidence, verdict.tokens, verdict.accepted, strict=True
        ):
            tested = sure[: len(tokens)]
            for place, each in enumerate(tested):
                self.pace.learn(each, place < accepted)
            if row.made < EVIDENCE:
                seen = self.tried.setdefault(row.number, [0, 0])
                seen[0] += len(tested)
                seen[1] += min(accepted, len(tested))
            self.tally.tested += len(tested)
            self.tally.accepted += min(accepted, len(tested))

    def keep(self, live: dict[int, Row], before: Sequence[int]) -> None:
        """Only these rows go on, each from its new end; before: how long each row's text was."""
        stay = [seat for seat, row in enumerate(self.rows) if row.number in live]
        taken = [len(self.rows[seat].history) - before[seat] for seat in stay]
        if len(stay) < len(self.rows):
            index = torch.tensor(stay, device=self.target.device)
            self.rows = [self.rows[seat] for seat in stay]
            self.target.keep(index)
            self.drafter.keep(index)
            self.hidden = self.hidden[index]
        self.target.settle(self.texts())
        self.drafter.settle(self.hidden, self.texts(), taken)


def speculate(speculation: Speculation, rows: Sequence[Row], n: int) -> Iterator[Made]:
    """The loop. n rows side by side share a prompt."""
    live = {row.number: row for row in rows}
    for row in rows:
        row.slide()
    speculation.begin(rows, n)
    while live:
        before = [len(row.history) for row in speculation.rows]
        for row, tokens, logprobs in speculation.cycle():
            for token, logprob in zip(tokens, logprobs, strict=True):
                made = row.take(token, logprob)
                if made.finished:
                    del live[row.number]
                yield made
                if made.finished:
                    break
        if not live:
            return
        going = [row for row in speculation.rows if row.number in live]
        slid = [row.slide() for row in going]
        if any(slid):
            speculation.begin(going, 1)
        else:
            speculation.keep(live, before)
