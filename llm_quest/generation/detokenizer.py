"""Incremental detokenization: text is released as tokens arrive, and no character and no stop string is ever split.

Commonly got wrong: the earliest stop string cuts, not the first of the list; a text that may become a stop string is
held back, and shown when it does not; what is held back when generation ends still belongs to the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class StreamDecoder(Protocol):
    """A tokenizer's streaming decoder: `feed` returns whole characters only."""

    def feed(self, token: int) -> str: ...

    def flush(self) -> str: ...


class StreamingTokenizer(Protocol):
    """The part of a tokenizer that generation needs."""

    def decode_stream(self, prompt_ids: Sequence[int] = ()) -> StreamDecoder: ...


class IncrementalDetokenizer:
    """One row's text as it grows. It ends before the first stop string; what might become one is held back until it is
    clear:

        stop "END", tokens "a" "b E" "N" "D."      feed returns  "a"  "b "  ""  ""      and `stopped` is True
        stop "END", tokens "a" "b E" "N" "T."      feed returns  "a"  "b "  ""  "ENT."

    prompt_ids: the ids before the text, behind which it is decoded (they decide whether it begins with a space)."""

    def __init__(self, tokenizer: StreamingTokenizer, stop_strings: Sequence[str], prompt_ids: Sequence[int] = ()):
        self.decoder = tokenizer.decode_stream(prompt_ids)
        self.stop_strings = stop_strings
        self.pending_text = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Add a token and return the text that has become certain: without stop strings, nothing is held back."""
        if not self.stop_strings:
            return self.decoder.feed(token)
        self.pending_text += self.decoder.feed(token)
        stop_places = [at for at in (self.pending_text.find(stop) for stop in self.stop_strings) if at >= 0]
        self.stopped = bool(stop_places)
        return self.release(
            min(stop_places) if stop_places else len(self.pending_text) - self.possible_stop_length(),
            forget=self.stopped,
        )

    def flush(self) -> str:
        """The rest, when no token follows: nothing after a stop string."""
        if self.stopped:
            return ""
        self.pending_text += self.decoder.flush()
        return self.release(len(self.pending_text))

    def release(self, length: int, *, forget: bool = False) -> str:
        """Take so many characters off the pending text; forget: drop the others."""
        piece, self.pending_text = self.pending_text[:length], "" if forget else self.pending_text[length:]
        return piece

    def possible_stop_length(self) -> int:
        """How many of the last pending characters may begin a stop string."""
        longest = max((len(stop) for stop in self.stop_strings), default=1) - 1
        starts = (
            n for n in range(min(longest, len(self.pending_text)), 0, -1) if self.is_stop_prefix(self.pending_text[-n:])
        )
        return next(starts, 0)

    def is_stop_prefix(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self.stop_strings)
