"""When a row ends, and the row itself while it is being written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm_quest.errors import UsageError
from llm_quest.generation.text import Streams, Text

Finished = Literal["eos", "stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Until:
    """When a row ends: at one of the `eos` tokens, at a `stop` (a sequence of tokens, or a string: needs the
    tokenizer), or at a length: max_new_tokens, or the model's context.

    beyond: what happens where the context is full. "stop": prompt and text together never exceed it. "slide": the
    oldest tokens are forgotten; the row goes on from its last context // 2 tokens, whose positions start again at 0,
    and grows to the context again (so a long text costs one more prefill per context // 2 tokens)."""

    max_new_tokens: int
    eos: tuple[int, ...] = ()
    stop: tuple[str | tuple[int, ...], ...] = ()
    tokenizer: Streams | None = None
    beyond: Literal["stop", "slide"] = "stop"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}: give at least 1")
        if self.beyond not in ("stop", "slide"):
            raise UsageError(f"beyond is {self.beyond!r}: 'stop' at the end of the context, or 'slide' the window")
        if any(len(stop) == 0 for stop in self.stop):
            raise UsageError("an empty stop would end every row before its first token: leave it out")
        if self.stop_strings and self.tokenizer is None:
            raise UsageError(
                f"the stop string {self.stop_strings[0]!r} needs the tokenizer: pass tokenizer=, or token ids"
            )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(stop for stop in self.stop if isinstance(stop, str))

    @property
    def stop_tokens(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(stop) for stop in self.stop if not isinstance(stop, str))


@dataclass(frozen=True)
class Made:
    """One token of one row, as it is made. text: what became certain with it ("" without a tokenizer)."""

    row: int
    token: int
    logprob: float
    text: str
    finished: Finished | None


@dataclass(frozen=True)
class Completion:
    """One finished row, without its prompt. tokens: all that were drawn, the eos or the stop that ended it included,
    each with its log-probability under the distribution that was sampled (temperature 0: the model's own, after the
    penalty). text: decoded without the eos and cut before the stop string; None without a tokenizer."""

    tokens: list[int]
    logprobs: list[float]
    finished: Finished
    text: str | None = None


class Row:
    """A text in the making: `history` is prompt and text; the model sees `history[start:]`."""

    def __init__(self, number: int, prompt: Sequence[int], until: Until, context: int):
        self.number = number
        self.history = list(prompt)
        self.prompt_length = len(prompt)
        self.until = until
        self.context = context
        self.start = 0
        self.text = None if until.tokenizer is None else Text(until.tokenizer, until.stop_strings)

    def take(self, token: int, logprob: float) -> Made:
        """Note a drawn token and say whether it was the last. An eos anywhere ends the row, whatever else was
        reached."""
        self.history.append(token)
        if token in self.until.eos:
            return Made(self.number, token, logprob, self.text.flush() if self.text else "", "eos")
        piece = self.text.feed(token) if self.text else ""
        finished = self.finished()
        if finished and self.text:
            piece += self.text.flush()
        return Made(self.number, token, logprob, piece, finished)

    def finished(self) -> Finished | None:
        made = self.made
        if self.text and self.text.stopped:
            return "stop"
        for stop in self.until.stop_tokens:
            if len(stop) <= made and tuple(self.history[-len(stop) :]) == stop:
                return "stop"
        full = self.until.beyond == "stop" and len(self.history) >= self.context
        return "length" if full or made >= self.until.max_new_tokens else None

    @property
    def window(self) -> list[int]:
        return self.history[self.start :]

    @property
    def made(self) -> int:
        """How many tokens were drawn."""
        return len(self.history) - self.prompt_length

    @property
    def tokens_left(self) -> int:
        """How many tokens may still be drawn."""
        return self.until.max_new_tokens - self.made

    def slide(self) -> bool:
        """Forget the oldest tokens if the window has no room left; True if it did."""
        if len(self.history) - self.start <= self.context:
            return False
        self.start = len(self.history) - max(self.context // 2, 1)
        return True
