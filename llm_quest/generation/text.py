"""Tokens become text while they are made: no character and no stop string is ever split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TextStream(Protocol):
    """A tokenizer's streaming decoder: what `feed` returns is whole characters only."""

    def feed(self, token: int) -> str: ...

    def flush(self) -> str: ...


class Streams(Protocol):
    """A tokenizer, as far as generation needs one."""

    def stream(self) -> TextStream: ...


class Text:
    """One row's text as it grows. It ends before the first stop string; what might become one is held back until it is
    clear:

        stop "END", tokens "a" "b E" "N" "D."      feed returns  "a"  "b "  ""  ""      and `stopped` is True
        stop "END", tokens "a" "b E" "N" "T."      feed returns  "a"  "b "  ""  "ENT."
    """

    def __init__(self, tokenizer: Streams, stops: Sequence[str]):
        self.decoder = tokenizer.stream()
        self.stops = stops
        self.so_far = ""
        self.held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self.held += self.decoder.feed(token)
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        self.stopped = bool(found)
        return self.release(min(found) if found else len(self.held) - self.doubtful(), forget=self.stopped)

    def flush(self) -> str:
        """The rest, when no token will follow: nothing after a stop string."""
        if self.stopped:
            return ""
        self.held += self.decoder.flush()
        return self.release(len(self.held))

    def release(self, length: int, *, forget: bool = False) -> str:
        piece, self.held = self.held[:length], "" if forget else self.held[length:]
        self.so_far += piece
        return piece

    def doubtful(self) -> int:
        """How many of the last characters held may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        starts = (n for n in range(min(longest, len(self.held)), 0, -1) if self.begins_stop(self.held[-n:]))
        return next(starts, 0)

    def begins_stop(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self.stops)
