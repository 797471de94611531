"""The model's side of speculative decoding: one pass over what is unread and guessed, and the way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope


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
