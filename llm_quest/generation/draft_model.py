"""The drafter that is a smaller model of the same vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.generation.decoding import left_padded
from llm_quest.generation.drafters import MOST, Drafts, Draw, GoesOn, Task, counted, weights
from llm_quest.generation.sampling import Sampling
from llm_quest.layers.cache import Cache
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope


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
