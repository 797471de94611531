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

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.generation.compiled import wide_enough
from llm_quest.generation.draft_model import ModelDrafter
from llm_quest.generation.draft_modules import LookaheadDrafter
from llm_quest.generation.draft_text import TextDrafter
from llm_quest.generation.drafters import Drafter, Drafts, Task
from llm_quest.generation.judge import Judge, Verdict
from llm_quest.generation.pace import Pace, Tally, least_acceptance
from llm_quest.generation.sampling import Sampling, seen_tokens
from llm_quest.generation.target import Target
from llm_quest.generation.until import Made, Row
from llm_quest.models.decoder import Decoder

Draft = Decoder | str
"""A smaller model, or "mtp" or "ngram"."""
EVIDENCE = (4, 8)
"""A sampled row judges its drafter twice, by its first so many tokens: the clock and the neighbours, which could change
its text, are not asked."""


def drafter_of(draft: Draft, model: Decoder, sampling: Sampling, *, compile: bool = False) -> Drafter:
    """What `draft=` means."""
    if isinstance(draft, Decoder):
        return ModelDrafter(draft, model, sampling, compile=compile)
    if draft == "mtp":
        return LookaheadDrafter(model, sampling, compile=compile)
    if draft == "ngram":
        return TextDrafter()
    raise UsageError(f"draft is {draft!r}: give a smaller model, 'mtp' (the model's own modules) or 'ngram'")


class Speculation:
    """A batch of texts being written with a drafter. `tally` counts what happened.

    seats: who sits in which row of the batch. Eagerly, rows that leave give up their seat; compiled, shapes are
    constant: the seat stays, empty (None), and what is read there is padding."""

    def __init__(
        self,
        model: Decoder,
        drafter: Drafter,
        sampling: Sampling,
        uniforms: tuple[Float[Tensor, "R S"], Float[Tensor, "R S"], Float[Tensor, "R S"]],
        tally: Tally,
        *,
        compile: bool = False,
    ):
        self.model, self.drafter, self.sampling, self.tally = model, drafter, sampling, tally
        self.target = Target(model, compile=compile)
        self.compile = compile
        self.guess_uniforms, accept, draw = uniforms
        self.judge = Judge(sampling, accept, draw)
        padded = (lambda columns: wide_enough(columns) or columns) if compile else None
        self.pace = Pace(drafter.most, timed=sampling.greedy, stride=drafter.stride, padded=padded)
        self.free = drafter.steady or sampling.greedy  # may lookaheads differ without changing the text?
        self.spare = 0 if drafter.steady and not sampling.greedy else 1  # columns read beyond the guesses
        self.least = least_acceptance(drafter.cost)
        self.tried: dict[int, list[int]] = {}
        self.silent: set[int] = set()

    def begin(self, seats: Sequence[Row | None], n: int) -> None:
        """Read what the rows see now, with room for all that may follow."""
        self.seats = list(seats)
        windows = [row.window if row else [0] for row in seats[::n]]
        capacity = max(min(row.context, len(row.window) + row.tokens_left) for row in self.rows)
        hidden = self.target.begin(windows, n, capacity, self.drafter.most + 1)
        self.drafter.begin(windows, n, capacity)
        self.target.settle(self.texts())
        self.drafter.settle(hidden, self.texts(), [len(row.window) - 1 if row else 0 for row in seats])

    @property
    def rows(self) -> list[Row]:
        """Those who are still written."""
        return [row for row in self.seats if row]

    def seen_now(self) -> Tensor | None:
        """What the repetition penalty falls on."""
        if self.sampling.repetition_penalty == 1:
            return None
        histories = [row.history if row else [] for row in self.seats]
        return seen_tokens(histories, self.model.config.vocab, self.target.device)

    def texts(self) -> list[list[int]]:
        return [row.window if row else [] for row in self.seats]

    def cycle(self) -> list[tuple[Row, list[int], list[float]]]:
        """Draft, read, judge: what now follows in each row."""
        started = time.perf_counter()
        self.seen = self.seen_now()
        texts, room = self.texts(), [self.room(row) if row else 0 for row in self.seats]
        drafts = self.drafted(texts, room)
        drafted = time.perf_counter()
        width = max(1, drafts.longest + self.spare)
        guesses = [part[: max(min(width, space) - 1, 0)] for part, space in zip(drafts.tokens, room, strict=True)]
        hidden, logits = self.target.read(texts, guesses)
        numbers, made = self.numbers(), [row.made if row else 0 for row in self.seats]
        verdict = self.judge(logits[:, :width], drafts, numbers, made, self.seen)
        self.hidden = hidden
        steps, written = drafts.longest, sum(map(len, verdict.tokens))
        self.pace.note(width, steps, written, time.perf_counter() - drafted, drafted - started)
        self.count(drafts, verdict)
        taken = [
            (row, tokens[:space], logprobs[:space])
            for row, tokens, logprobs, space in zip(self.seats, verdict.tokens, verdict.logprobs, room, strict=True)
            if row
        ]
        if any(math.isnan(each) for _, _, logprobs in taken for each in logprobs):
            raise ValueError("the model's logits are not finite, so no token can be drawn: look for NaN in its weights")
        return taken

    def numbers(self) -> list[int]:
        """Whose random numbers each seat draws with; nobody looks at what an empty one draws."""
        return [row.number if row else 0 for row in self.seats]

    def room(self, row: Row) -> int:
        """How many tokens this row can take before it ends, its window slides, or its drafter is judged."""
        places = row.context - len(row.window) + (row.until.beyond == "slide")
        trials = [] if self.pace.timed else [evidence - row.made for evidence in EVIDENCE if evidence > row.made]
        return min(row.tokens_left, places, *trials)

    def drafted(self, texts: Sequence[Sequence[int]], room: Sequence[int]) -> Drafts:
        """The guesses of rows whose drafter is worth asking."""
        paced = self.pace.begin(len(self.rows))
        most = paced if self.free else self.drafter.most
        wanted = [
            0 if row is None or self.gave_up(row) else max(min(most, space - self.spare), 0)
            for row, space in zip(self.seats, room, strict=True)
        ]
        if not any(wanted):
            return Drafts([[] for _ in texts], None, [[] for _ in texts])
        made = [row.made if row else 0 for row in self.seats]
        places = torch.tensor(made)[:, None] + torch.arange(self.drafter.most)
        places = places.clamp(max=self.guess_uniforms.shape[1] - 1)
        uniforms = self.guess_uniforms[self.numbers()]
        task = Task(texts, wanted, uniforms.gather(1, places.to(uniforms.device)), self.seen)
        return self.drafter.propose(task, self.goes_on)

    def goes_on(self, confidence: Sequence[Sequence[float]]) -> bool:
        if not self.free:
            return True
        chances = [math.prod(self.pace.chance(each) for each in row) for row in confidence if row]
        return self.pace.goes_on(chances, max(map(len, confidence)) + self.spare)

    def gave_up(self, row: Row) -> bool:
        """Has this row's own beginning shown that drafts do not pay? Where the clock may decide, it does instead."""
        if not self.pace.timed and row.made in EVIDENCE:
            tested, accepted = self.tried.get(row.number, (0, 0))
            if (accepted + 1) / (tested + 2) < self.least:
                self.silent.add(row.number)
        return row.number in self.silent

    def count(self, drafts: Drafts, verdict: Verdict) -> None:
        self.tally.passes += 1
        self.tally.plain += drafts.longest == 0
        for row, sure, tokens, accepted in zip(
            self.seats, drafts.confidence, verdict.tokens, verdict.accepted, strict=True
        ):
            if row is None:
                continue
            tested = sure[: len(tokens)]
            for place, each in enumerate(tested):
                self.pace.learn(each, place < accepted)
            if row.made < EVIDENCE[-1]:
                seen = self.tried.setdefault(row.number, [0, 0])
                seen[0] += len(tested)
                seen[1] += min(accepted, len(tested))
            self.tally.tokens += len(tokens)
            self.tally.tested += len(tested)
            self.tally.accepted += min(accepted, len(tested))

    def keep(self, live: dict[int, Row], before: dict[int, int]) -> None:
        """Only these rows go on, each from its new end; before: how long each row's text was."""
        stay = [seat for seat, row in enumerate(self.seats) if row and row.number in live]
        if self.compile:
            self.seats = [row if row and row.number in live else None for row in self.seats]
        elif len(stay) < len(self.seats):
            index = torch.tensor(stay, device=self.target.device)
            self.seats = [self.seats[seat] for seat in stay]
            self.target.keep(index)
            self.drafter.keep(index)
            self.hidden = self.hidden[index]
        texts = self.texts()
        self.target.settle(texts)
        self.drafter.settle(self.hidden, texts, [len(r.history) - before[r.number] if r else 0 for r in self.seats])


def speculate(speculation: Speculation, rows: Sequence[Row], n: int) -> Iterator[Made]:
    """The loop. n rows side by side share a prompt."""
    live = {row.number: row for row in rows}
    for row in rows:
        row.slide()
    speculation.begin(rows, n)
    while live:
        before = {number: len(row.history) for number, row in live.items()}
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
        slid = [row.slide() for row in live.values()]
        if any(slid):
            seats = [row if row and row.number in live else None for row in speculation.seats]
            speculation.begin(seats if speculation.compile else list(live.values()), 1)
        else:
            speculation.keep(live, before)
