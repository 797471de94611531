"""Prefix reuse: the rows of finished requests, so that a prompt that begins like one of them (the same system message,
the next turn of a conversation) is computed from where it differs.

Layers decide how far they can go back (`Cache.rewind`): keys and values to any position, a ring as far as it has not
been overwritten, a recurrent state to the end of the prompt that it was made by."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from llm_quest.layers.kv_cache import Cache
from llm_quest.models.decoder import Decoder
from llm_quest.serve.cache_rows import CacheRow

MIN_SHARED_TOKENS = 16
"""Below this the copy of a row costs more than the pass that it saves."""

LazyPrefix = tuple[Sequence[int], Callable[[], CacheRow]]
"""Tokens, and what returns their row."""


class PrefixCache:
    """Rows of finished texts, at most `max_bytes` of them; the one that was not used for the longest time goes first.
    beginnings: texts with the same first MIN_SHARED_TOKENS tokens. queries, hits: tokens that were looked up and
    that were found."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.nbytes = max_bytes, 0
        self.rows: OrderedDict[tuple[int, ...], CacheRow] = OrderedDict()
        self.beginnings: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        self.queries = self.hits = 0

    def store(self, token_ids: Sequence[int], row: CacheRow) -> None:
        """Keep a copy of the row of these tokens."""
        key = tuple(token_ids[: row.length])
        if row.length < MIN_SHARED_TOKENS or row.nbytes() > self.max_bytes:
            return
        self.drop(key)
        self.rows[key] = row.clone()
        self.beginnings.setdefault(key[:MIN_SHARED_TOKENS], {})[key] = None
        self.nbytes += self.rows[key].nbytes()
        while self.nbytes > self.max_bytes:
            self.drop(next(iter(self.rows)))

    def drop(self, key: tuple[int, ...]) -> None:
        if (row := self.rows.pop(key, None)) is not None:
            self.nbytes -= row.nbytes()
            alike = self.beginnings[key[:MIN_SHARED_TOKENS]]
            del alike[key]
            if not alike:
                del self.beginnings[key[:MIN_SHARED_TOKENS]]

    def find(
        self, model: Decoder, prompt: Sequence[int], running: Iterable[LazyPrefix], capacity: int
    ) -> tuple[Cache | None, int]:
        """A cache that holds the beginning of a prompt, and how many of its tokens; (None, 0) where none is known. At
        least one token is left to compute. running: texts that are being generated."""
        self.queries += len(prompt)
        begin, wanted = tuple(prompt[:MIN_SHARED_TOKENS]), np.array(prompt[:-1])
        alike: list[LazyPrefix] = [(key, partial(self.rows.__getitem__, key)) for key in self.beginnings.get(begin, ())]
        alike += (one for one in running if tuple(one[0][:MIN_SHARED_TOKENS]) == begin)
        for token_ids, read in sorted(alike, key=lambda one: -shared_length(wanted, one[0]))[:2]:
            row = read()
            shared = min(shared_length(wanted, token_ids), row.length)
            if shared < MIN_SHARED_TOKENS:
                break
            cache = row.to_cache(model, capacity, len(prompt))
            if (start := rewind_to(cache, shared, row.length)) >= MIN_SHARED_TOKENS:
                if (key := tuple(token_ids)) in self.rows:
                    self.rows.move_to_end(key)
                self.hits += start
                return cache, start
        return None, 0


def rewind_to(cache: Cache, position: int, length: int) -> int:
    """Rewind a cache of one row with `length` positions; where it stands then. 0 where it cannot."""
    if position == length:
        return position
    try:
        return cache.rewind([position])[0]
    except ValueError:  # a ring that has overwritten what is needed
        return 0


def shared_length(wanted: np.ndarray, token_ids: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    other = np.asarray(token_ids[: len(wanted)])
    same = wanted[: len(other)] == other
    return len(same) if same.all() else int(same.argmin())
