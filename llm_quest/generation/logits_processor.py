"""Logits processors that read a row's history: biases, penalties by count, n-grams and early ends that are forbidden.

What they do is added to the logits, -inf for a token that must not be drawn:

    logits + logit_bias -> repetition penalty -> - frequency_penalty * count - presence_penalty * [count > 0]
           -> no n-gram twice -> no end before min_new_tokens -> temperature and filters (`sampling.py`)

Commonly got wrong: the presence and frequency penalties (OpenAI's) count generated tokens alone; the repetition penalty
and the n-grams, as in transformers, the prompt's too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.generation.sampling import NEG_INF, SamplingParams
from llm_quest.generation.stopping import GeneratedSequence, StoppingCriteria

LogitOffsets = dict[int, float]
"""What is added to the logits of some tokens."""


class LogitsProcessor:
    """Logits processors for one batch. UsageError for a bias of a token that the model does not have."""

    def __init__(
        self,
        sampling_params: SamplingParams,
        stopping_criteria: StoppingCriteria,
        vocab_size: int,
        device: torch.device,
    ):
        self.sampling_params, self.stopping_criteria = sampling_params, stopping_criteria
        self.vocab_size, self.device = vocab_size, device
        wrong = next((token for token, _ in sampling_params.logit_bias if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise UsageError(f"logit_bias names token {wrong}, but the model knows 0 to {vocab_size - 1}")
        self.bias = self.to_tensor([dict(sampling_params.logit_bias)])[0] if sampling_params.logit_bias else None

    @property
    def reads_history(self) -> bool:
        """Whether what is added depends on what a row has generated."""
        params = self.sampling_params
        return bool(
            params.presence_penalty
            or params.frequency_penalty
            or params.no_repeat_ngram_size
            or self.stopping_criteria.min_new_tokens
        )

    @property
    def changes_logits(self) -> bool:
        """Whether anything comes between the model's logits and the temperature."""
        return self.bias is not None or self.reads_history or self.sampling_params.repetition_penalty != 1

    def add_bias(self, logits: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch V"]:
        return logits if self.bias is None else logits + self.bias

    def history_offsets(self, rows: Sequence[GeneratedSequence | None]) -> Float[Tensor, "B V"] | None:
        """What the history of each row adds; None: nothing."""
        if not self.reads_history:
            return None
        return self.to_tensor([self.row_offsets(row.token_ids, row.prompt_length) if row else {} for row in rows])

    def draft_offsets(
        self, rows: Sequence[GeneratedSequence | None], guesses: Sequence[Sequence[int]], width: int
    ) -> Float[Tensor, "B T V"] | None:
        """What is added to the logits at each of `width` columns, where the guesses before it belong to the history."""
        if not self.reads_history:
            return None
        columns = [
            self.row_offsets([*row.token_ids, *guess[:column]], row.prompt_length) if row else {}
            for row, guess in zip(rows, guesses, strict=True)
            for column in range(width)
        ]
        return self.to_tensor(columns).view(len(rows), width, self.vocab_size)

    def row_offsets(self, token_ids: Sequence[int], prompt_length: int) -> LogitOffsets:
        """What a row with these tokens adds. UsageError where it forbids every token."""
        params, generated = self.sampling_params, token_ids[prompt_length:]
        offsets: LogitOffsets = {}
        if params.presence_penalty or params.frequency_penalty:
            for token, count in Counter(generated).items():
                offsets[token] = -params.presence_penalty - count * params.frequency_penalty
        if params.no_repeat_ngram_size:
            offsets |= dict.fromkeys(find_ngram_ends(token_ids, params.no_repeat_ngram_size), NEG_INF)
        if len(generated) < self.stopping_criteria.min_new_tokens:
            offsets |= dict.fromkeys(self.stopping_criteria.eos_token_ids, NEG_INF)
        if len(offsets) == self.vocab_size and all(value == NEG_INF for value in offsets.values()):
            raise UsageError(
                f"no_repeat_ngram_size={params.no_repeat_ngram_size} forbids every token after {len(generated)} new "
                "ones: raise it, or lower max_new_tokens"
            )
        return offsets

    def to_tensor(self, rows: Sequence[LogitOffsets]) -> Float[Tensor, "B V"]:
        offsets_tensor = torch.zeros(len(rows), self.vocab_size)
        for row, offsets in zip(offsets_tensor, rows, strict=True):
            known = {token: value for token, value in offsets.items() if token < self.vocab_size}
            row[list(known)] = torch.tensor(list(known.values()))
        return offsets_tensor.to(self.device)


def find_ngram_ends(token_ids: Sequence[int], n: int) -> Iterable[int]:
    """The tokens that would repeat an n-gram: those that have followed the last n - 1 tokens before."""
    tail = list(token_ids[len(token_ids) - n + 1 :]) if n > 1 else []
    return [token_ids[at + n - 1] for at in range(len(token_ids) - n + 1) if list(token_ids[at : at + n - 1]) == tail]
