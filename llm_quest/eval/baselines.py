"""Baselines for bits per byte: n-gram models and compressors on the same held-out bytes. A model's bits per byte mean
little without them.

Interpolated Kneser-Ney (Chen & Goodman 1998, section 4.1.6 and the modified discounts of section 4.1.7), over bytes or
tokens. With h' the context h without its oldest symbol, and N(h, i) how many symbols were seen i times after h:

    p(w | h) = max(c(h w) - D(c(h w)), 0) / c(h)  +  [D1 N(h,1) + D2 N(h,2) + D3 N(h,3+)] / c(h) * p(w | h')

At the highest order c counts occurrences; below, c(h w) counts the *different* symbols seen before h w. Below the
unigrams is the uniform distribution, so nothing has probability zero. An unseen context gives all its weight to the
shorter one.

Commonly got wrong: occurrences used at the lower orders too ("San Francisco" makes "Francisco" likely everywhere).
The end of a document is predicted like any symbol, here as in the models, so every number includes its cost.
"""

from __future__ import annotations

import bz2
import lzma
import math
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_quest.data.document import Document
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, UsageError


@dataclass(frozen=True)
class Baseline:
    """A baseline's bits per byte on the held-out documents, fitted to the training documents."""

    name: str
    bits_per_byte: float
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "bits_per_byte": self.bits_per_byte, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True, eq=False)
class NgramLevel:
    """The n-grams of one order. grams: sorted keys, context * base + symbol, where a context is its index at the order
    below. discounted: (c - D) / c(h) of each gram. backoff_weights: the weight that each context gives to the shorter
    one."""

    grams: np.ndarray
    discounted: np.ndarray
    backoff_weights: np.ndarray


class KneserNey:
    """An n-gram model of `order` over symbols 0..vocab_size-1, built with `KneserNey.fit`. Each sequence begins with a
    context of unseen start symbols and should end with its own end symbol."""

    def __init__(self, levels: Sequence[NgramLevel], vocab_size: int):
        self.levels = levels
        self.vocab_size = vocab_size

    @property
    def order(self) -> int:
        return len(self.levels)

    @classmethod
    def fit(cls, sequences: Iterable[np.ndarray], vocab_size: int, order: int = 5) -> KneserNey:
        """Fit to sequences of integers below vocab_size."""
        if order < 1:
            raise UsageError(f"order is {order}; expected 1 (unigrams) or more")
        symbols, predicted = _concatenate(sequences, vocab_size, order)
        keys, numbers = [], [np.zeros(len(symbols), dtype=np.int64)]  # numbers[n][t]: the n-gram that ends at t
        for _ in range(order):
            ngrams, number = np.unique(_shift_right(numbers[-1]) * (vocab_size + 1) + symbols, return_inverse=True)
            keys.append(ngrams)
            numbers.append(number)
        counts = [np.bincount(numbers[order][predicted], minlength=len(keys[-1]))]
        for n in range(order - 1, 0, -1):  # one place of each seen (n+1)-gram: the different symbols before an n-gram
            place = np.full(len(keys[n]), -1)
            place[numbers[n + 1][predicted]] = predicted
            counts.insert(0, np.bincount(numbers[n][place[place >= 0]], minlength=len(keys[n - 1])))
        sizes = [1, *(len(ngrams) for ngrams in keys[:-1])]
        return cls(
            [_make_level(k, c, size, vocab_size) for k, c, size in zip(keys, counts, sizes, strict=True)], vocab_size
        )

    def negative_log_likelihood(self, sequences: Iterable[np.ndarray]) -> float:
        """Sum of -ln p over all symbols of the sequences."""
        symbols, predicted = _concatenate(sequences, self.vocab_size, self.order)
        return float(-np.log(self._probabilities(symbols)[predicted]).sum())

    def next_symbol_probs(self, context: Sequence[int]) -> np.ndarray:
        """p(. | context), (V,)."""
        last = [self.vocab_size] * self.order + list(context)
        rows = np.array([[*last[len(last) - self.order + 1 :], w] for w in range(self.vocab_size)], dtype=np.int64)
        return self._probabilities(rows.ravel()).reshape(rows.shape)[:, -1]

    def _probabilities(self, symbols: np.ndarray) -> np.ndarray:
        p = np.full(len(symbols), 1.0 / self.vocab_size)
        number = np.zeros(len(symbols), dtype=np.int64)
        for level in self.levels:
            context = _shift_right(number)
            number = _lookup(level.grams, context * (self.vocab_size + 1) + symbols, context >= 0)
            passed = np.where(context >= 0, level.backoff_weights[context], 1.0)
            p = p * passed + np.where(number >= 0, level.discounted[number], 0.0)
        return p


def compute_baselines(
    train: Sequence[Document], val: Sequence[Document], *, tokenizer: Tokenizer | None = None, order: int = 5
) -> list[Baseline]:
    """Unigram and Kneser-Ney models over bytes (and over the tokenizer's tokens), and three compressors. The bytes are
    those of the held-out documents."""
    if not train or not val:
        raise DataError("baselines need training and held-out documents; hold out a part of the data")
    rows = _ngram_baselines("bytes", byte_sequences(train), byte_sequences(val), 257, order, val)
    if tokenizer is not None:
        numbers = token_sequences(train, tokenizer), token_sequences(val, tokenizer)
        rows += _ngram_baselines("tokens", *numbers, tokenizer.vocab_size, order, val)
    for name, compress in COMPRESSORS.items():
        start = time.perf_counter()
        bits = compressor_bits_per_byte(train, val, compress)
        rows.append(Baseline(name, bits, time.perf_counter() - start))
    return rows


def _ngram_baselines(
    kind: str,
    train: Sequence[np.ndarray],
    val: Sequence[np.ndarray],
    vocab_size: int,
    order: int,
    documents: Sequence[Document],
) -> list[Baseline]:
    """Unigrams and n-grams of `order`; documents: those of val, for their bytes."""
    rows = []
    for n in sorted({1, order}):
        start = time.perf_counter()
        nats = KneserNey.fit(train, vocab_size, n).negative_log_likelihood(val)
        name = f"unigram, {kind}" if n == 1 else f"Kneser-Ney {n}-gram, {kind}"
        bits = nats / math.log(2) / sum(document.nbytes for document in documents)
        rows.append(Baseline(name, bits, time.perf_counter() - start))
    return rows


def compressor_bits_per_byte(
    train: Sequence[Document], val: Sequence[Document], compress: Callable[[bytes], bytes]
) -> float:
    """(size(train + val) - size(train)) in bits per byte of val: the cost of val given train, within the compressor's
    window (zlib 32 kB, bz2 900 kB, lzma 64 MB)."""
    before = b"".join(document.text.encode() + b"\0" for document in train)
    whole = before + b"".join(document.text.encode() + b"\0" for document in val)
    return 8 * (len(compress(whole)) - len(compress(before))) / sum(document.nbytes for document in val)


def byte_sequences(documents: Sequence[Document]) -> list[np.ndarray]:
    """Bytes 0..255 of each document and 256 as its end."""
    return [
        np.append(np.frombuffer(document.text.encode(), dtype=np.uint8).astype(np.int64), 256) for document in documents
    ]


def token_sequences(documents: Sequence[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Tokens of each document and the end-of-text token."""
    encoded = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
    return [np.array([*ids, tokenizer.eos_token_id], dtype=np.int64) for ids in encoded]


def kneser_ney_discounts(counts: np.ndarray) -> np.ndarray:
    """D1, D2, D3+ from how many n-grams were seen once to four times (Chen & Goodman, eq. 26); 0.75 each where a count
    is zero."""
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if 0 in (n1, n2, n3, n4):
        return np.array([0.0, 0.75, 0.75, 0.75])
    y = n1 / (n1 + 2 * n2)
    exact = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.clip(exact, [0.0, 0.05, 0.05, 0.05], [0.0, 1.0, 2.0, 3.0])


def _make_level(keys: np.ndarray, counts: np.ndarray, num_contexts: int, vocab_size: int) -> NgramLevel:
    context = keys // (vocab_size + 1)
    discount = np.minimum(kneser_ney_discounts(counts)[np.minimum(counts, 3)], counts)
    total = np.bincount(context, counts, num_contexts)
    passed = np.bincount(context, discount, num_contexts)
    seen = total > 0
    passed = np.where(seen, passed / np.where(seen, total, 1), 1.0)
    return NgramLevel(keys, (counts - discount) / np.maximum(total[context], 1), passed)


def _concatenate(sequences: Iterable[np.ndarray], vocab_size: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """All sequences in one array, with `order` start symbols (the number vocab_size) before each, and the indices of
    the other symbols."""
    start = np.full(order, vocab_size, dtype=np.int64)
    pieces = [piece for sequence in sequences for piece in (start, np.asarray(sequence, dtype=np.int64))]
    symbols = np.concatenate(pieces) if pieces else start
    if symbols.min() < 0 or symbols.max() > vocab_size:
        raise DataError(
            f"symbols reach from {symbols.min()} to {symbols.max()}, outside the vocabulary of {vocab_size}"
        )
    return symbols, np.flatnonzero(symbols < vocab_size)


def _shift_right(number: np.ndarray) -> np.ndarray:
    """The index of the n-gram that ends one position earlier. The first position is a start symbol, whose context is
    not used."""
    return np.concatenate([[0], number[:-1]])


def _lookup(grams: np.ndarray, keys: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The index of each key in the sorted grams; -1 where it is absent or masked out."""
    place = np.minimum(np.searchsorted(grams, keys), len(grams) - 1)
    return np.where(mask & (grams[place] == keys), place, -1)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "zlib -9": lambda data: zlib.compress(data, 9),
    "bz2 -9": lambda data: bz2.compress(data, 9),
    "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}
