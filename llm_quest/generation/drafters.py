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

from llm_quest.errors import UsageError
from llm_quest.generation.decoding import left_padded
from llm_quest.generation.sampling import Sampling, inverse_cdf
from llm_quest.layers.cache import Cache
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope

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


class ModelDrafter:
    """A smaller model of the same vocabulary, with a cache of its own. `known`: how many tokens of each row it holds;
    what is missing is read with the first step."""

    steady = True
    most = MOST

    def __init__(self, draft: Decoder, target: Decoder, sampling: Sampling):
        if draft.config.vocab != target.config.vocab:
            raise UsageError(
                f"the draft knows {draft.config.vocab} tokens, the model {target.config.vocab}: a draft must have "
                "the model's own tokenizer; train one with tokenizer.load, or take draft='ngram'"
            )
        if draft.training:
            raise UsageError("the draft is in training mode, where dropout would disturb it: call draft.eval() first")
        self.model = draft
        self.sampling = sampling
        self.device = next(draft.parameters()).device
        self.cost = counted(weights(draft), weights(target), len(draft.blocks), len(target.blocks))

    @torch.inference_mode()
    def begin(self, windows: Sequence[Sequence[int]], n: int, capacity: int) -> None:
        capacity = min(capacity, self.model.config.context)
        self.cache = self.model.new_cache(len(windows), capacity, MOST + 1)
        read = [list(window[:-1])[: self.model.config.context] for window in windows]
        read_into(self.model, read, [0] * len(windows), self.cache, self.device)
        self.known = [len(part) for part in read for _ in range(n)]
        if n > 1:
            self.cache.repeat(n)

    @torch.inference_mode()
    def propose(self, task: Task, goes_on: GoesOn) -> Drafts:
        drawing = Draw(self.sampling, task)
        room = [self.model.config.context - len(text) + 1 for text in task.texts]
        wanted = [min(want, space) for want, space in zip(task.wanted, room, strict=True)]
        rows = [row for row, want in enumerate(wanted) if want > 0]
        missing = [list(text[known:]) for text, known in zip(task.texts, self.known, strict=True)]
        while rows and (not any(drawing.tokens) or goes_on(drawing.confidence)):
            fed = [part if row in rows else [] for row, part in enumerate(missing)]
            tokens = drawing.draw(self.read(fed), rows).tolist()
            self.known = [known + len(part) for known, part in zip(self.known, fed, strict=True)]
            missing = [[token] for token in tokens]
            rows = [row for row in rows if wanted[row] > len(drawing.tokens[row])]
        return drawing.drafts()

    def read(self, fed: Sequence[Sequence[int]]) -> Float[Tensor, "B V"]:
        """Read these tokens behind what is known; logits after each row's last."""
        return self.model.head(read_into(self.model, fed, self.known, self.cache, self.device)[:, -1])

    @torch.inference_mode()
    def settle(self, hidden: Float[Tensor, "B T D"], texts: Sequence[Sequence[int]], taken: Sequence[int]) -> None:
        to = [min(known, len(text) - 1) for known, text in zip(self.known, texts, strict=True)]
        if to != self.known:
            self.known = self.cache.rewind(to)

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.known = [self.known[row] for row in rows.tolist()]


def read_into(
    model: Decoder, fed: Sequence[Sequence[int]], starts: Sequence[int], cache: Cache, device: torch.device
) -> Float[Tensor, "B T D"]:
    """Read each row's tokens (perhaps none) from its place on; what the head reads, rows ending in the last column."""
    if not any(map(len, fed)):
        return torch.zeros(len(fed), 1, model.config.width, device=device)
    tokens, positions = left_padded(fed)
    positions = torch.where(positions < 0, -1, positions + torch.tensor(list(starts))[:, None])
    reach = max(start + len(part) for start, part in zip(starts, fed, strict=True) if part)
    alike = len({(start, len(part)) for start, part in zip(starts, fed, strict=True)}) == 1
    scope = Scope(positions.to(device), cache=cache, reach=reach, plain=alike)
    return model.hidden(tokens.to(device), scope)


class TextDrafter:
    """The text itself (prompt look-up): what followed the last time the same few tokens stood here. The longest of
    `sizes` that occurred before speaks. Free, and right where texts repeat: code, quotations, summaries."""

    steady = True
    most = 2 * MOST
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


class LookaheadDrafter:
    """The model's own multi-token modules (`layers.multi_token`). Module k stands one token further on than module k-1:
    at position j it reads the output of module k-1 at j-1 and token j, and predicts token j+1.

          known to the target   a b c            d is drawn, not yet read
          module 1 reads          b c d          predicts e'        from h(a) h(b) h(c), each verified
          module 2 reads            c d e'       predicts f'        e' is a guess: read again when it is known

    So each cycle begins with what the target has verified: every module reads the tokens taken since, then the guesses
    of the modules before it. Entries made from guesses need not be taken back: nobody sees a later position than its
    own, and by then the entry has been written again."""

    steady = False

    def __init__(self, target: Decoder, sampling: Sampling):
        if not len(target.lookahead):
            raise UsageError(
                "this model has no multi-token prediction modules to draft with: take a smaller model or 'ngram', "
                "or train it with modules (techniques: multi_token)"
            )
        self.model = target
        self.sampling = sampling
        self.device = next(target.parameters()).device
        self.most = len(target.lookahead)
        own = sum(p.numel() for p in target.lookahead.parameters()) / self.most
        own += target.head.weight.numel()  # type: ignore[operator, union-attr]
        self.cost = counted(own, weights(target), 1, len(target.blocks))

    @torch.inference_mode()
    def begin(self, windows: Sequence[Sequence[int]], n: int, capacity: int) -> None:
        rows = len(windows) * n
        modules = list(self.model.lookahead)
        self.caches = [
            Cache([module.block.mixer.layer.new_cache(rows, capacity + MOST, MOST + 1)], rows, capacity + MOST)  # type: ignore[union-attr, operator]
            for module in modules
        ]
        like = self.model.head.weight
        self.before: list[Tensor] = [like.new_zeros(rows, 1, self.model.config.width)] * self.most  # type: ignore[operator]
        self.unread: Unread | None = None

    def settle(self, hidden: Float[Tensor, "B T D"], texts: Sequence[Sequence[int]], taken: Sequence[int]) -> None:
        """Keep what the target's head read at the tokens that were taken, for the next guess."""
        length = max(taken)
        if not length:
            return
        positions = torch.full((len(texts), length), -1)
        tokens = torch.zeros_like(positions)
        for row, (text, count) in enumerate(zip(texts, taken, strict=True)):
            tokens[row, :count] = torch.tensor(text[len(text) - count :], dtype=torch.int64)
            positions[row, :count] = torch.arange(len(text) - count, len(text))
        new = Unread(hidden[:, :length], tokens.to(self.device), positions.to(self.device))
        self.unread = new if self.unread is None else self.unread.then(new)

    @torch.inference_mode()
    def propose(self, task: Task, goes_on: GoesOn) -> Drafts:
        drawing = Draw(self.sampling, task)
        if self.unread is None:
            return drawing.drafts()
        h, tokens, positions = self.unread
        width, at = tokens.shape[1], self.unread.last
        lengths = [len(text) for text in task.texts]
        place = torch.tensor(lengths, device=self.device)[:, None]
        rows = [row for row, want in enumerate(task.wanted) if want > 0 and lengths[row] > 1]
        for k, module in enumerate(self.model.lookahead):
            scope = Scope(torch.where(positions > k, positions, -1), cache=self.caches[k]).at(0)
            out = module(h, self.model.embed(tokens, scope), scope)
            rows = [row for row in rows if task.wanted[row] > k]
            rows = rows if k == 0 or (rows and goes_on(drawing.confidence)) else []
            here = column(out, at) if k == 0 else out[:, -1:]
            guess = drawing.draw(self.model.head(here)[:, 0], rows)[:, None] if rows else tokens[:, :1]
            guesses = torch.tensor([row in rows for row in range(len(lengths))], device=self.device)[:, None]
            after = column(out, at)
            h = torch.cat((self.before[k], out[:, : width - 1], after, out[:, width:]), dim=1)
            self.before[k] = torch.where((positions[:, :1] < 0)[:, :, None], self.before[k], after)
            tokens = torch.cat((tokens, guess), dim=1)
            positions = torch.cat((positions, torch.where(guesses, place + k, -1)), dim=1)
        self.unread = None
        return drawing.drafts()

    def keep(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.keep(rows)
        self.before = [before[rows] for before in self.before]
        self.unread = None if self.unread is None else Unread(*(part[rows] for part in self.unread))


class Unread(NamedTuple):
    """Verified tokens (B,T) at their positions that no module has read, padding at the end, and beside each what the
    target's head read one token before."""

    h: Float[Tensor, "B T D"]
    tokens: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]

    def then(self, more: Unread) -> Unread:
        """Both, padding at the end."""
        h, tokens, positions = (torch.cat(pair, dim=1) for pair in zip(self, more, strict=True))
        order = (positions < 0).to(torch.int8).argsort(dim=1, stable=True)
        return Unread(h.gather(1, order[..., None].expand_as(h)), tokens.gather(1, order), positions.gather(1, order))

    @property
    def last(self) -> Int[Tensor, " B"]:
        """The column of each row's last token."""
        return (self.positions >= 0).sum(dim=1).sub(1).clamp(min=0)


def column(x: Float[Tensor, "B T D"], at: Int[Tensor, " B"]) -> Float[Tensor, "B 1 D"]:
    """One column of each row."""
    return x.gather(1, at[:, None, None].expand(-1, 1, x.shape[2]))


def counted(weights: float, of_weights: float, depth: int, of_depth: int) -> float:
    """What one pass costs in passes of another: half by the weights read, half by the layers called."""
    return (weights / of_weights + depth / of_depth) / 2


def weights(model: Decoder) -> int:
    """What a pass reads, without the modules that only draft."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("lookahead."))
