"""A download that trickles is given up, as one that is silent is: a time limit for each read never ends it."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

MIN_BYTES_PER_SECOND = 1000.0
WINDOW_SECONDS = 30.0


def limit_rate(parts: Iterable[bytes], fail: Callable[[str], Exception]) -> Iterator[bytes]:
    """The parts as they arrive. Raises what `fail` makes of a message, where fewer than MIN_BYTES_PER_SECOND have come
    in WINDOW_SECONDS of waiting."""
    waited, received, since = 0.0, 0, time.monotonic()
    for part in parts:
        waited, received = waited + time.monotonic() - since, received + len(part)
        yield part
        if waited >= WINDOW_SECONDS:
            if received < MIN_BYTES_PER_SECOND * waited:
                raise fail(f"it sends {received / waited:.0f} bytes a second, and is given up")
            waited, received = 0.0, 0
        since = time.monotonic()


def limit_response(response: Any) -> None:
    """For an answer of the client that `huggingface_hub` uses: ReadTimeout makes it ask again for the rest."""
    http = importlib.import_module(type(response).__module__.partition(".")[0])  # httpx, or httpx2
    stream, request = response.stream, response.request

    class RateLimitedStream(http.SyncByteStream):  # type: ignore[misc, name-defined]
        def __iter__(self) -> Iterator[bytes]:
            return limit_rate(stream, lambda text: http.ReadTimeout(text, request=request))

        def close(self) -> None:
            stream.close()

    response.stream = RateLimitedStream()


@contextmanager
def require_rate() -> Iterator[None]:
    """Inside, what `huggingface_hub` downloads in Python has to come at a rate."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks["response"]
    hooks.append(limit_response)
    try:
        yield
    finally:
        hooks.remove(limit_response)
