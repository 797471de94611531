"""The model's side of speculative decoding: one pass over what is unread and guessed, and the way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.generation.compiled import check_step, compiled, leaves_trail, rounded_up, wide_enough
from llm_quest.generation.decoding import going_on, right_padded
from llm_quest.models.decoder import Decoder


class Target:
    """Its cache, where each row stands in it, and the pass. A row without a text has left, and what it reads is
    padding.

    compile: passes have one of a few widths, each one compiled graph."""

    def __init__(self, model: Decoder, *, compile: bool = False):
        self.model = model
        self.device = next(model.parameters()).device
        self.step = compiled(check_step, model) if compile else None

    @torch.inference_mode()
    def begin(self, windows: Sequence[Sequence[int]], n: int, capacity: int, slack: int) -> Tensor:
        """Read all but each window's last token, padding at the end; what the head would read."""
        self.cache = self.model.new_cache(len(windows), rounded_up(capacity) if self.step else capacity, slack)
        self.stands = [len(window) - 1 for window in windows for _ in range(n)]
        longest = max(len(window) for window in windows) - 1
        if longest == 0:
            hidden = self.model.head.weight.new_zeros(len(windows), 0, self.model.config.width)  # type: ignore[operator, union-attr]
        else:
            hidden = self.hidden([window[:-1] for window in windows], [0] * len(windows), longest)
        if n > 1:
            self.cache.repeat(n)
            hidden = hidden.repeat_interleave(n, dim=0)
        return hidden

    def hidden(self, fed: Sequence[Sequence[int]], starts: Sequence[int], width: int) -> Float[Tensor, "B T D"]:
        tokens, positions = right_padded(fed, starts, width, self.device)
        return self.model.hidden(tokens, going_on(fed, starts, positions, self.cache))

    @torch.inference_mode()
    def read(self, texts: Sequence[Sequence[int]], guesses: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """What the head reads, and the logits, at each row's last token and the guesses behind it."""
        fed = [[*text[stand:], *guess] for text, stand, guess in zip(texts, self.stands, guesses, strict=True)]
        behind = [len(text) - stand for text, stand in zip(texts, self.stands, strict=True)]
        hidden, logits = self.checked(fed, max(map(len, fed)))
        self.stands = [stand + len(part) for stand, part in zip(self.stands, fed, strict=True)]
        if max(behind) > 1:  # a cache that went further back than asked: the tokens read again are not judged
            hidden, logits = (from_column(x, behind) for x in (hidden, logits))
        width = max(map(len, guesses)) + 1
        return hidden[:, :width], logits[:, :width]

    def checked(self, fed: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
        """One pass, of at least `width` columns."""
        columns = wide_enough(width) if self.step else None
        if self.step is None or columns is None:
            hidden = self.hidden(fed, self.stands, width)
            return hidden, self.model.head(hidden)
        return self.step(self.model, *right_padded(fed, self.stands, columns, self.device), self.cache)

    @torch.inference_mode()
    def settle(self, texts: Sequence[Sequence[int]]) -> None:
        """Each row's last token is unread, and what was guessed wrongly is taken back."""
        to = [min(stand, max(len(text) - 1, 0)) for stand, text in zip(self.stands, texts, strict=True)]
        if to != self.stands or (self.step and leaves_trail(self.cache)):
            self.stands = self.cache.rewind(to)

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.stands = [self.stands[row] for row in rows.tolist()]


def from_column(x: Float[Tensor, "B T D"], behind: Sequence[int]) -> Float[Tensor, "B T D"]:
    """Every row from its behind[b]-th column on; the last column again at the end."""
    index = torch.tensor([max(each, 1) for each in behind], device=x.device)[:, None] - 1
    index = (index + torch.arange(x.shape[1], device=x.device)).clamp(max=x.shape[1] - 1)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
