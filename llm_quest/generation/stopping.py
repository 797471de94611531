"""Stopping criteria, and the state of a sequence while it is generated.

Commonly got wrong: a stop of tokens must lie in what was generated, not reach into the prompt; a text is decoded behind
its prompt, or its first space is lost; an eos ends its own row alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from llm_quest.errors import UsageError
from llm_quest.generation.detokenizer import IncrementalDetokenizer, StreamingTokenizer

FinishReason = Literal["eos", "stop", "length"]


def end_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a text of this model: those of its generation_config.json and those of its tokenizer. All
    that generates asks here, so that an answer ends at the same token wherever it is sampled, evaluated or shown."""
    advised = () if model.generation_config is None else model.generation_config.eos_token_ids
    return tuple(sorted({*advised, *tokenizer.eos_token_ids}))


@dataclass(frozen=True, kw_only=True)
class StoppingCriteria:
    """When a sequence ends: at one of `eos_token_ids`, at a `stop` (a sequence of tokens, or a string, which needs the
    tokenizer), or at a length: max_new_tokens, or the model's context. min_new_tokens: no eos is drawn before so many.

    on_full_context: what happens where the context is full. "stop": prompt and text together never exceed it. "slide":
    the oldest tokens are dropped; the row goes on from its last context // 2 tokens, whose positions start again at 0,
    and grows to the context again (so a long text costs one more prefill per context // 2 tokens)."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    stop: tuple[str | tuple[int, ...], ...] = ()
    tokenizer: StreamingTokenizer | None = None
    on_full_context: Literal["stop", "slide"] = "stop"
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}: give at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UsageError(f"min_new_tokens is {self.min_new_tokens}: give 0 to max_new_tokens={self.max_new_tokens}")
        if self.on_full_context not in ("stop", "slide"):
            raise UsageError(
                f"on_full_context is {self.on_full_context!r}: 'stop' at the end of the context, or 'slide' the window"
            )
        if any(len(stop) == 0 for stop in self.stop):
            raise UsageError("an empty stop would end every row before its first token: leave it out")
        if self.stop_strings and self.tokenizer is None:
            raise UsageError(
                f"the stop string {self.stop_strings[0]!r} needs the tokenizer: pass tokenizer=, or token ids"
            )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(stop for stop in self.stop if isinstance(stop, str))

    @cached_property
    def stop_tokens(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(stop) for stop in self.stop if not isinstance(stop, str))


@dataclass(frozen=True)
class GeneratedToken:
    """One token of one row, as it is generated. text: what became certain with it ("" without a tokenizer)."""

    row: int
    token: int
    logprob: float
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Completion:
    """One finished row, without its prompt. tokens: all that were sampled, the eos or the stop that ended it included,
    each with its log-probability under the distribution that was sampled (temperature 0: the model's own, after the
    penalty). text: decoded without the eos and cut before the stop string; None without a tokenizer."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    text: str | None = None


class GeneratedSequence:
    """A sequence being generated: `token_ids` is prompt and text; the model sees `token_ids[window_start:]`."""

    def __init__(self, number: int, prompt: Sequence[int], stopping_criteria: StoppingCriteria, max_context: int):
        self.number = number
        self.token_ids = list(prompt)
        self.prompt_length = len(prompt)
        self.stopping_criteria = stopping_criteria
        self.max_context = max_context
        self.window_start = 0
        self.detokenizer = (
            None
            if stopping_criteria.tokenizer is None
            else IncrementalDetokenizer(stopping_criteria.tokenizer, stopping_criteria.stop_strings, prompt)
        )

    def append_token(self, token: int, logprob: float) -> GeneratedToken:
        """Append a sampled token; the result says whether it was the last. An eos ends the row, whatever else was
        reached."""
        self.token_ids.append(token)
        if token in self.stopping_criteria.eos_token_ids:
            return GeneratedToken(
                self.number, token, logprob, self.detokenizer.flush() if self.detokenizer else "", "eos"
            )
        piece = self.detokenizer.feed(token) if self.detokenizer else ""
        finished = self.check_finished()
        if finished and self.detokenizer:
            piece += self.detokenizer.flush()
        return GeneratedToken(self.number, token, logprob, piece, finished)

    def check_finished(self) -> FinishReason | None:
        """Why the row ends here; None if it goes on."""
        num_generated = self.num_generated
        if self.detokenizer and self.detokenizer.stopped:
            return "stop"
        for stop in self.stopping_criteria.stop_tokens:
            if len(stop) <= num_generated and tuple(self.token_ids[-len(stop) :]) == stop:
                return "stop"
        full = self.stopping_criteria.on_full_context == "stop" and len(self.token_ids) >= self.max_context
        return "length" if full or num_generated >= self.stopping_criteria.max_new_tokens else None

    @property
    def window(self) -> list[int]:
        """The tokens that the model sees."""
        return self.token_ids[self.window_start :]

    @property
    def num_generated(self) -> int:
        """Number of sampled tokens."""
        return len(self.token_ids) - self.prompt_length

    @property
    def tokens_left(self) -> int:
        """How many tokens may still be sampled."""
        return self.stopping_criteria.max_new_tokens - self.num_generated

    def slide_window(self) -> bool:
        """Drop the oldest tokens if the window has no room left; True if it did."""
        if len(self.token_ids) - self.window_start <= self.max_context:
            return False
        self.window_start = len(self.token_ids) - max(self.max_context // 2, 1)
        return True
