"""The drafter that is the model itself: its multi-token prediction modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.generation.drafters import MOST, Drafts, Draw, GoesOn, Task, counted, weights
from llm_quest.generation.sampling import Sampling
from llm_quest.layers.cache import Cache
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope


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
