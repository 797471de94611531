"""The target model of speculative decoding: one pass over unread and drafted tokens, and the rewind after it.

Commonly got wrong: after a rejection the cache is taken back to before the last token, which is unread; rows that
accepted unlike numbers are taken back to unlike places; a cache that went back further reads tokens again, which are
not judged a second time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.generation.compiled import choose_width, compile_for_model, keeps_history, round_up_capacity, verify_step
from llm_quest.generation.decoding import continuation_scope, pad_right
from llm_quest.models.decoder import Decoder


class TargetModel:
    """The target model with its cache and the length that it holds of each row. A row without a text has ended, and
    what it reads is padding.

    compile: passes have one of a few widths, each one compiled graph."""

    def __init__(self, model: Decoder, *, compile: bool = False):
        self.model = model
        self.device = next(model.parameters()).device
        self.compiled_step = compile_for_model(verify_step, model) if compile else None

    @torch.inference_mode()
    def prefill(self, windows: Sequence[Sequence[int]], rows_per_window: int, capacity: int, slack: int) -> Tensor:
        """Read all but each window's last token, padding at the end; returns the hidden states."""
        self.kv_cache = self.model.new_cache(
            len(windows), round_up_capacity(capacity) if self.compiled_step else capacity, slack
        )
        self.cached_lengths = [len(window) - 1 for window in windows for _ in range(rows_per_window)]
        longest = max(len(window) for window in windows) - 1
        if longest == 0:
            hidden = self.model.head.weight.new_zeros(len(windows), 0, self.model.config.hidden_size)  # type: ignore[operator, union-attr]
        else:
            hidden = self.forward_hidden([window[:-1] for window in windows], [0] * len(windows), longest)
        if rows_per_window > 1:
            self.kv_cache.batch_repeat_interleave(rows_per_window)
            hidden = hidden.repeat_interleave(rows_per_window, dim=0)
        return hidden

    def forward_hidden(
        self, token_rows: Sequence[Sequence[int]], starts: Sequence[int], width: int
    ) -> Float[Tensor, "B T D"]:
        """Append each row's tokens to the cache; their hidden states."""
        tokens, positions = pad_right(token_rows, starts, width, self.device)
        return self.model.hidden_states(tokens, continuation_scope(token_rows, starts, positions, self.kv_cache))

    @torch.inference_mode()
    def score_drafts(self, texts: Sequence[Sequence[int]], guesses: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Hidden states and logits at each row's last token and at the drafts after it."""
        token_rows = [
            [*text[stand:], *guess] for text, stand, guess in zip(texts, self.cached_lengths, guesses, strict=True)
        ]
        behind = [len(text) - stand for text, stand in zip(texts, self.cached_lengths, strict=True)]
        hidden, logits = self.forward_columns(token_rows, max(map(len, token_rows)))
        self.cached_lengths = [stand + len(part) for stand, part in zip(self.cached_lengths, token_rows, strict=True)]
        if max(behind) > 1:  # a cache that went further back than asked: the tokens read again are not judged
            hidden, logits = (shift_columns(x, behind) for x in (hidden, logits))
        width = max(map(len, guesses)) + 1
        return hidden[:, :width], logits[:, :width]

    def forward_columns(self, token_rows: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
        """One pass of at least `width` columns."""
        columns = choose_width(width) if self.compiled_step else None
        if self.compiled_step is None or columns is None:
            hidden = self.forward_hidden(token_rows, self.cached_lengths, width)
            return hidden, self.model.head(hidden)
        return self.compiled_step(
            self.model, *pad_right(token_rows, self.cached_lengths, columns, self.device), self.kv_cache
        )

    @torch.inference_mode()
    def rewind_to(self, texts: Sequence[Sequence[int]]) -> None:
        """Rewind the cache, so that each row's last token is unread and rejected drafts are gone."""
        to = [min(stand, max(len(text) - 1, 0)) for stand, text in zip(self.cached_lengths, texts, strict=True)]
        if to != self.cached_lengths or (self.compiled_step and keeps_history(self.kv_cache)):
            self.cached_lengths = self.kv_cache.rewind(to)

    def keep_rows(self, rows: Tensor) -> None:
        self.kv_cache.batch_select_indices(rows)
        self.cached_lengths = [self.cached_lengths[row] for row in rows.tolist()]


def shift_columns(x: Float[Tensor, "B T D"], behind: Sequence[int]) -> Float[Tensor, "B T D"]:
    """Every row from column behind[b] - 1 on; the last column is repeated at the end."""
    index = torch.tensor([max(each, 1) for each in behind], device=x.device)[:, None] - 1
    index = (index + torch.arange(x.shape[1], device=x.device)).clamp(max=x.shape[1] - 1)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
