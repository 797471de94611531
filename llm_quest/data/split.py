"""The held-out split: by whole documents, with near-copies of a document on its side.

Commonly got wrong: cutting the token stream in two, so that a document, or its twin with another licence header, lies
on both sides and the held-out loss measures memory.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from llm_quest.data.corpus import Corpus
from llm_quest.data.documents import Document
from llm_quest.errors import DataError, UsageError

SHINGLE_WORDS = 8  # words that must agree in a row
NEAR_COPY_OVERLAP = 0.5  # near-copies: this part of the shorter document's runs also stands in the other
MAX_FULL_COMPARISON_BYTES = 64 << 20  # bytes up to which every run is compared; above, one in two, three, ...


@dataclass(frozen=True)
class CorpusSplit:
    """Training and held-out documents, both in the corpus's order."""

    corpus: Corpus
    train: tuple[Document, ...]
    val: tuple[Document, ...]


def split_corpus(corpus: Corpus, *, held_out: float = 0.1) -> CorpusSplit:
    """Hold out about `held_out` of the bytes, in whole documents chosen by the hash of their text: no seed, and
    adding a document moves few others. Where no document is small enough (a single file, a few long ones), the end
    of the longest one is held out, cut at a line, which the report says. held_out 0 holds nothing out."""
    if not 0 <= held_out < 1:
        raise UsageError(f"held_out is {held_out}; expected a part of the bytes, at least 0 and below 1")
    if held_out == 0:
        return CorpusSplit(corpus, corpus.documents, ())
    groups = near_copies(corpus.documents)
    copies = [group for group in groups if len(group) > 1]
    if copies:
        number = sum(len(group) for group in copies)
        corpus.drop_report.note(
            f"near-copies: {number} documents in {len(copies)} groups, each kept on one side of the split"
        )
    chosen = _choose_held_out(corpus.documents, groups, held_out)
    if not chosen:
        return _split_longest_document(corpus, held_out)
    train = tuple(document for i, document in enumerate(corpus.documents) if i not in chosen)
    val = tuple(document for i, document in enumerate(corpus.documents) if i in chosen)
    corpus.drop_report.note(
        f"overlap: {shingle_overlap(train, val):.1%} of the held-out runs of {SHINGLE_WORDS} words are in the training "
        "text too"
    )
    return CorpusSplit(corpus, train, val)


def near_copies(documents: Sequence[Document]) -> list[list[int]]:
    """Groups of document indices that are near-copies of one another, directly or through a third; most have one
    member. Two documents are near-copies if SHARED of the shorter one's shingles (runs of words) are also in the
    other."""
    every = 1 + sum(document.nbytes for document in documents) // MAX_FULL_COMPARISON_BYTES
    runs = [shingle_hashes(document.text, every) for document in documents]
    shared = Counter(pair for numbers in _documents_per_shingle(runs) for pair in _pairs(numbers))
    parents = list(range(len(documents)))
    for (a, b), count in shared.items():
        if count >= NEAR_COPY_OVERLAP * min(len(runs[a]), len(runs[b])):
            parents[_find_root(parents, b)] = _find_root(parents, a)
    groups: dict[int, list[int]] = defaultdict(list)
    for number in range(len(documents)):
        groups[_find_root(parents, number)].append(number)
    return list(groups.values())


def shingle_overlap(train: Sequence[Document], val: Sequence[Document]) -> float:
    """The fraction of the held-out shingles that are also in the training documents: how much of the held-out text
    can be known by memory."""
    every = 1 + sum(document.nbytes for document in train) // MAX_FULL_COMPARISON_BYTES
    known = np.unique(np.concatenate([shingle_hashes(document.text, every) for document in train]))
    asked = np.concatenate([shingle_hashes(document.text, every) for document in val])
    return float(np.isin(asked, known).mean()) if len(asked) else 0.0


def shingle_hashes(text: str, every: int = 1) -> np.ndarray:
    """64-bit hashes of the shingles (runs of SHINGLE_WORDS words) of a text, each once; a sample of them, chosen by
    the hash and so the same in every text."""
    words = np.array([zlib.crc32(word.encode()) for word in re.findall(r"\w+", text.lower())], dtype=np.uint64)
    words = np.pad(words, (0, max(0, SHINGLE_WORDS - len(words))))
    runs = np.zeros(len(words) - SHINGLE_WORDS + 1, dtype=np.uint64)
    for k in range(SHINGLE_WORDS):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + words[k : len(words) - SHINGLE_WORDS + 1 + k]  # modulo 2^64
    runs = np.unique(runs ^ (runs >> np.uint64(29)))
    return runs[runs % np.uint64(every) == 0]


def _documents_per_shingle(runs: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """For each shingle that is in several documents, their indices."""
    hashes = np.concatenate(runs)
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], np.repeat(np.arange(len(runs)), [len(one) for one in runs])[order]
    begins = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
    ends = np.append(begins[1:], len(hashes))
    several = ends - begins > 1
    return (owners[a:b].tolist() for a, b in zip(begins[several].tolist(), ends[several].tolist(), strict=True))


def _pairs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """All pairs; only neighbours where a phrase is in many documents (all pairs of a licence header are too many)."""
    return combinations(numbers, 2) if len(numbers) <= 50 else pairwise(numbers)


def _find_root(parents: list[int], number: int) -> int:
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number


def _choose_held_out(documents: Sequence[Document], groups: list[list[int]], held_out: float) -> set[int]:
    """Indices of the held-out documents: groups in the order of their hash, as long as they fit; empty if none does."""
    target = held_out * sum(document.nbytes for document in documents)
    chosen: set[int] = set()
    taken = 0
    for group in sorted(groups, key=lambda group: min(documents[i].hash for i in group)):
        size = sum(documents[i].nbytes for i in group)
        if taken < target and taken + size <= 1.25 * target:
            chosen.update(group)
            taken += size
    return chosen if taken >= 0.5 * target else set()


def _split_longest_document(corpus: Corpus, held_out: float) -> CorpusSplit:
    """Hold out the end of the longest document, from the beginning of a line (or of a word, or just there)."""
    longest = max(corpus.documents, key=lambda document: document.nbytes)
    length = min(round(held_out * corpus.nbytes / longest.nbytes * len(longest.text)), len(longest.text) // 2)
    place = len(longest.text) - length
    for mark in ("\n", " "):
        found = longest.text.find(mark, place, place + max(length // 2, 1))
        if found >= 0:
            place = found + 1
            break
    train, val = longest.text[:place], longest.text[place:]
    if not train.strip() or not val.strip():
        raise DataError(
            f"{longest.source} has {longest.nbytes} bytes, too few to hold out {held_out:.0%}; add text or hold out 0"
        )
    line = longest.line + train.count("\n")
    corpus.drop_report.note(
        f"no document is small enough to be held out: the end of {longest.source} is, from line {line}"
    )
    kept = Document(train, longest.source, longest.line)
    remaining = tuple(kept if document is longest else document for document in corpus.documents)
    return CorpusSplit(corpus, remaining, (Document(val, longest.source, line),))
