"""The drafter that is a smaller model of the same vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.generation.compiled import compiled, leaves_trail, rounded_up
from llm_quest.generation.decoding import going_on, left_padded
from llm_quest.generation.drafters import MOST, Drafts, GoesOn, Notes, Task, counted, drawn, together, weights
from llm_quest.generation.sampling import Sampling
from llm_quest.layers.cache import Cache
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope

STRIDE = 4
"""A compiled lookahead draws so many tokens before the host looks at them."""
BEHIND = 2
"""It begins with so many columns: after a full acceptance the last guess is unread, and the token after it."""


class ModelDrafter:
    """It has a cache of its own. `known`: how many tokens of each row it holds; what is missing is read with the first
    step.

    compile: `stride` tokens are drawn in one graph, each read by the next step without leaving it (`lookahead`)."""

    steady = True
    most = MOST

    def __init__(self, draft: Decoder, target: Decoder, sampling: Sampling, *, compile: bool = False):
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
        self.graph = compiled(lookahead, draft) if compile else None
        self.stride = STRIDE if compile else 1
        size, of = (weights(draft), len(draft.blocks)), (weights(target), len(target.blocks))
        self.cost = counted(size[0], of[0], size[1], of[1], compiled=compile)

    @torch.inference_mode()
    def begin(self, windows: Sequence[Sequence[int]], n: int, capacity: int) -> None:
        capacity = min(capacity, self.model.config.context)
        self.cache = self.model.new_cache(len(windows), rounded_up(capacity) if self.graph else capacity, MOST + 1)
        read = [list(window[:-1])[: self.model.config.context] for window in windows]
        read_into(self.model, read, [0] * len(windows), self.cache, self.device)
        self.known = [len(part) for part in read for _ in range(n)]
        if n > 1:
            self.cache.repeat(n)

    @torch.inference_mode()
    def propose(self, task: Task, goes_on: GoesOn) -> Drafts:
        notes = Notes(task)
        room = [self.model.config.context - len(text) + 1 for text in task.texts]
        wanted = [min(want, space) for want, space in zip(task.wanted, room, strict=True)]
        rows = [row for row, want in enumerate(wanted) if want > 0]
        missing = [list(text[known:]) for text, known in zip(task.texts, self.known, strict=True)]
        while rows and (not notes.steps or goes_on(notes.confidence)):
            fed = [part if row in rows else [] for row, part in enumerate(missing)]
            tokens = self.guess(fed, notes, wanted)
            missing = [new[-1:] for new in tokens]
            rows = [row for row in rows if wanted[row] > len(notes.tokens[row])]
        return notes.drafts()

    def guess(self, fed: list[list[int]], notes: Notes, wanted: Sequence[int]) -> list[list[int]]:
        """Read these tokens behind what is known and draw what follows: one token of every row, or `stride`."""
        if self.graph:
            return self.guess_ahead(fed, notes, wanted)
        at = notes.steps
        new = drawn(self.sampling, self.read(fed), notes.task.uniforms[:, at], notes.seen)
        q = None if new.q is None else new.q[:, None]
        return notes.add(new.tokens[:, None], new.sure[:, None], q, wanted)

    def read(self, fed: Sequence[Sequence[int]]) -> Float[Tensor, "B V"]:
        """Logits after each row's last token."""
        hidden = read_into(self.model, fed, self.known, self.cache, self.device)
        self.known = [known + len(part) for known, part in zip(self.known, fed, strict=True)]
        return self.model.head(hidden[:, -1])

    def guess_ahead(self, fed: list[list[int]], notes: Notes, wanted: Sequence[int]) -> list[list[int]]:
        assert self.graph is not None, "asked for where there is one"
        if max(map(len, fed)) > BEHIND:  # after a rest
            old = [part[:-1] for part in fed]
            self.read(old)
            fed = [part[-1:] for part in fed]
        at, stride = notes.steps, self.stride
        ends = [len(text) + want - 1 for text, want in zip(notes.task.texts, wanted, strict=True)]
        tokens, positions = left_padded(fed, width=BEHIND)
        starts = torch.tensor(self.known)[:, None]
        places = (
            tokens.to(self.device),
            torch.where(positions < 0, -1, positions + starts).to(self.device),
            torch.tensor(ends, device=self.device)[:, None],
        )
        uniforms = notes.task.uniforms[:, at : at + stride].clone()
        new = self.graph(self.model, *places, self.cache, self.sampling, uniforms, notes.seen)
        self.known = [
            min(known + len(part) + stride - 1, end) if part else known
            for known, part, end in zip(self.known, fed, ends, strict=True)
        ]
        return notes.add(*new, wanted)

    @torch.inference_mode()
    def settle(self, hidden: Float[Tensor, "B T D"], texts: Sequence[Sequence[int]], taken: Sequence[int]) -> None:
        to = [min(known, max(len(text) - 1, 0)) for known, text in zip(self.known, texts, strict=True)]
        if to != self.known or (self.graph and leaves_trail(self.cache)):
            self.known = self.cache.rewind(to)

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.known = [self.known[row] for row in rows.tolist()]


def lookahead(
    model: Decoder,
    tokens: Int[Tensor, "B T"],
    positions: Int[Tensor, "B T"],
    ends: Int[Tensor, "B 1"],
    cache: Cache,
    sampling: Sampling,
    uniforms: Float[Tensor, "B c"],
    seen: Bool[Tensor, "B V"] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Several steps of drafting as one graph: tokens (B,c), how sure each is (B,c), what they were drawn from (B,c,V).
    ends: a row reads nothing at this position or later, so that none runs out of its cache."""
    made = []
    for column in uniforms.unbind(dim=1):
        logits = model.head(model.hidden(tokens, Scope(positions, cache=cache))[:, -1])
        made.append(new := drawn(sampling, logits, column, seen))
        tokens = new.tokens[:, None]
        seen = None if seen is None else seen.scatter(1, tokens, True)
        here = positions[:, -1:]
        positions = torch.where((here < 0) | (here + 1 >= ends), -1, here + 1)
    return together(made)


def read_into(
    model: Decoder, fed: Sequence[Sequence[int]], starts: Sequence[int], cache: Cache, device: torch.device
) -> Float[Tensor, "B T D"]:
    """Read each row's tokens (perhaps none) from its place on; what the head reads, rows ending in the last column."""
    if not any(map(len, fed)):
        return torch.zeros(len(fed), 1, model.config.width, device=device)
    tokens, positions = left_padded(fed)
    positions = torch.where(positions < 0, -1, positions + torch.tensor(list(starts))[:, None])
    return model.hidden(tokens.to(device), going_on(fed, starts, positions.to(device), cache))
