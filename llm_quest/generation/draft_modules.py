"""The drafter that is the model itself: its multi-token prediction modules (`layers.multi_token`). Module k stands one
token further on than module k-1: at position j it reads the output of module k-1 at j-1 and token j, and predicts
token j+1.

      known to the target   a b c            d is drawn, not yet read
      module 1 reads          b c d          predicts e'        from h(a) h(b) h(c), each verified
      module 2 reads            c d e'       predicts f'        e' is a guess: read again when it is known

So each cycle begins with what the target has verified: every module reads the tokens taken since, then the guesses of
the modules before it. Entries made from guesses need not be taken back: nobody sees a later position than its own, and
by then the entry has been written again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.generation.compiled import compiled, rounded_up
from llm_quest.generation.decoding import right_padded
from llm_quest.generation.drafters import MOST, Drafts, GoesOn, Notes, Task, counted, drawn, together, weights
from llm_quest.generation.sampling import Sampling
from llm_quest.layers.cache import Cache
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope


class Reading(NamedTuple):
    """What a module reads: tokens (B,T) at their positions, and beside each what the module before it (or the target's
    head) made of the token before. First come the verified ones, padding at their end, then one column for each
    guess."""

    h: Float[Tensor, "B T D"]
    tokens: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]

    def then(self, more: Reading) -> Reading:
        """Both, padding at the end."""
        h, tokens, positions = (torch.cat(pair, dim=1) for pair in zip(self, more, strict=True))
        order = (positions < 0).to(torch.int8).argsort(dim=1, stable=True)
        return Reading(h.gather(1, order[..., None].expand_as(h)), tokens.gather(1, order), positions.gather(1, order))

    def padded(self, width: int) -> Reading:
        """The same in so many columns, in memory of its own (a compiled graph asks how it lies)."""
        batch, length, width_h = self.h.shape
        h, tokens = self.h.new_zeros(batch, width, width_h), self.tokens.new_zeros(batch, width)
        positions = self.positions.new_full((batch, width), -1)
        h[:, :length], tokens[:, :length], positions[:, :length] = self
        return Reading(h, tokens, positions)

    @property
    def last(self) -> Int[Tensor, " B"]:
        """The column of each row's last token."""
        return (self.positions >= 0).sum(dim=1).sub(1).clamp(min=0)


class LookaheadDrafter:
    """compile: all modules as one graph (`chain`), reading at most as many verified tokens as a cycle can bring."""

    steady = False

    def __init__(self, target: Decoder, sampling: Sampling, *, compile: bool = False):
        if not len(target.lookahead):
            raise UsageError(
                "this model has no multi-token prediction modules to draft with: take a smaller model or 'ngram', "
                "or train it with modules (techniques: multi_token)"
            )
        self.model = target
        self.sampling = sampling
        self.device = next(target.parameters()).device
        self.graph = compiled(chain, target) if compile else None
        self.most = len(target.lookahead)
        self.stride = self.most if compile else 1
        own = sum(p.numel() for p in target.lookahead.parameters()) / self.most
        own += target.head.weight.numel()  # type: ignore[operator, union-attr]
        self.cost = counted(own, weights(target), 1, len(target.blocks), compiled=compile)

    @torch.inference_mode()
    def begin(self, windows: Sequence[Sequence[int]], n: int, capacity: int) -> None:
        rows = len(windows) * n
        slots = capacity + MOST
        slots = rounded_up(slots) if self.graph else slots
        self.caches = [
            Cache([module.block.mixer.layer.new_cache(rows, slots, MOST + 1)], rows, slots)  # type: ignore[union-attr, operator]
            for module in self.model.lookahead
        ]
        like = self.model.head.weight
        shape = (rows, 1, self.model.config.width)
        self.before: list[Tensor] = [like.new_zeros(shape) for _ in self.caches]  # type: ignore[operator]
        self.unread: list[Reading] = []

    def settle(self, hidden: Float[Tensor, "B T D"], texts: Sequence[Sequence[int]], taken: Sequence[int]) -> None:
        """Keep what the target's head read at the tokens that were taken, for the next guess."""
        length = max(taken)
        if not length:
            return
        starts = [len(text) - count for text, count in zip(texts, taken, strict=True)]
        fed = [text[start:] for text, start in zip(texts, starts, strict=True)]
        self.unread.append(Reading(hidden[:, :length], *right_padded(fed, starts, length, self.device)))

    def taken_since(self) -> Reading:
        """All that was verified since the last guess."""
        first, *others = self.unread
        for more in others:
            first = first.then(more)
        return first

    @torch.inference_mode()
    def propose(self, task: Task, goes_on: GoesOn) -> Drafts:
        notes = Notes(task)
        if not self.unread:
            return notes.drafts()
        reading = self.taken_since()
        self.unread = []
        wanted = [want if len(text) > 1 else 0 for want, text in zip(task.wanted, task.texts, strict=True)]
        ends = torch.tensor([len(text) for text in task.texts], device=self.device)[:, None]
        if self.graph and reading.tokens.shape[1] <= self.most + 1:
            asked = torch.tensor(wanted, device=self.device)[:, None]
            uniforms = task.uniforms[:, : self.most].clone()
            tokens, sure, q, self.before = self.graph(
                self.model,
                reading.padded(self.most + 1),
                (ends, asked),
                self.before,
                self.caches,
                self.sampling,
                uniforms,
                notes.seen,
            )
            notes.add(tokens, sure, q, wanted)
            return notes.drafts()
        at, verified = reading.last, reading.tokens.shape[1]
        for k, cache in enumerate(self.caches):
            out = module_pass(self.model, k, reading, cache)
            guess = torch.zeros_like(reading.tokens[:, 0])
            if k and max(wanted) > k and not goes_on(notes.confidence):
                wanted = [min(want, k) for want in wanted]
            if max(wanted) > k:
                logits = self.model.head(newest(out, at, k))
                guess, sure, q = drawn(self.sampling, logits, task.uniforms[:, k], notes.seen)
                notes.add(guess[:, None], sure[:, None], None if q is None else q[:, None], wanted)
            guessing = torch.tensor([want > k for want in wanted], device=self.device)[:, None]
            place = torch.where(guessing, ends + k, -1)
            reading, self.before[k] = passed_on(reading, out, at, verified, self.before[k], guess, place)
        return notes.drafts()

    def keep(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.keep(rows)
        self.before = [before[rows] for before in self.before]
        self.unread = [Reading(*(part[rows] for part in each)) for each in self.unread]


def module_pass(model: Decoder, k: int, reading: Reading, cache: Cache) -> Float[Tensor, "B T D"]:
    """Module k (from 0) reads; it has nothing to say about the first k+1 tokens of a text."""
    scope = Scope(torch.where(reading.positions > k, reading.positions, -1), cache=cache).at(0)
    return model.lookahead[k](reading.h, model.embed(reading.tokens, scope), scope)


def newest(out: Float[Tensor, "B T D"], at: Int[Tensor, " B"], k: int) -> Float[Tensor, "B D"]:
    """What module k made of the last token: the last verified one, or the guess behind it."""
    return (column(out, at) if k == 0 else out[:, -1:])[:, 0]


def passed_on(
    reading: Reading,
    out: Float[Tensor, "B T D"],
    at: Int[Tensor, " B"],
    verified: int,
    before: Float[Tensor, "B 1 D"],
    guess: Int[Tensor, " B"],
    place: Int[Tensor, "B 1"],
) -> tuple[Reading, Float[Tensor, "B 1 D"]]:
    """What the next module reads: the same tokens and the guess, each beside this module's output one token before; and
    what of that output the next cycle begins with."""
    after = column(out, at)
    h = torch.cat((before, out[:, : verified - 1], after, out[:, verified:]), dim=1)
    tokens = torch.cat((reading.tokens, guess[:, None]), dim=1)
    positions = torch.cat((reading.positions, place), dim=1)
    nothing_read = (reading.positions[:, :1] < 0)[:, :, None]
    return Reading(h, tokens, positions), torch.where(nothing_read, before, after)


def chain(
    model: Decoder,
    reading: Reading,
    room: tuple[Int[Tensor, "B 1"], Int[Tensor, "B 1"]],
    before: list[Tensor],
    caches: list[Cache],
    sampling: Sampling,
    uniforms: Float[Tensor, "B m"],
    seen: Bool[Tensor, "B V"] | None,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """All modules as one graph: guesses (B,m), how sure each is (B,m), what they were drawn from (B,m,V), and what the
    next cycle begins with. room: each text's length, and how many guesses it wants."""
    at, verified = reading.last, reading.tokens.shape[1]
    ends, wanted = room
    made, kept = [], []
    for k, cache in enumerate(caches):
        out = module_pass(model, k, reading, cache)
        made.append(new := drawn(sampling, model.head(newest(out, at, k)), uniforms[:, k], seen))
        seen = None if seen is None else seen.scatter(1, new.tokens[:, None], True)
        place = torch.where(wanted > k, ends + k, -1)
        reading, after = passed_on(reading, out, at, verified, before[k], new.tokens, place)
        kept.append(after)
    return *together(made), kept


def column(x: Float[Tensor, "B T D"], at: Int[Tensor, " B"]) -> Float[Tensor, "B 1 D"]:
    """One column of each row."""
    return x.gather(1, at[:, None, None].expand(-1, 1, x.shape[2]))
