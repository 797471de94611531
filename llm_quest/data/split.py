"""The held-out split: by whole documents, with near-copies of a document on its side.

Commonly got wrong: cutting the token stream in two, so that a document, or its twin with another license header, lies
on both sides and the held-out loss measures memory.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice, pairwise

import numpy as np

from llm_quest.data.corpus import Corpus
from llm_quest.data.document import Document
from llm_quest.errors import DataError, UsageError

SHINGLE_WORDS = 8  # words that must agree in a row
NEAR_COPY_OVERLAP = 0.5  # near-copies: this part of the shorter document's runs also stands in the other
COMMON_TEXT_DOCUMENTS = 50  # a run of words in more documents is common text: a header, a license, instructions
MIN_OWN_PART = 0.25  # documents with at least this part of runs of their own are compared without the common text
WORDS_AT_ONCE = 1 << 16
MIN_SHARE, MAX_EXCESS = 0.5, 1.25  # how far the bytes held out may be from what was asked for
MAX_FULL_COMPARISON_BYTES = 64 << 20  # bytes up to which every run is compared; above, one in two, three, ...


@dataclass(frozen=True)
class CorpusSplit:
    """Training and held-out documents, both in the corpus's order."""

    corpus: Corpus
    train: tuple[Document, ...]
    val: tuple[Document, ...]


def choose_eval_part(sizes: Sequence[int], keys: Sequence[str], part: str) -> list[int]:
    """The numbers of the held-out items that are evaluated. part: `all`, or one of the halves `dev` and `test`, which
    have no item and no key in common and about the same size. key: what decides the half, such as the hash of a text or
    of a question. DataError where a half would be empty."""
    if part == "all":
        return list(range(len(sizes)))
    groups: dict[str, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        groups[key].append(number)
    halves: dict[str, list[int]] = {"dev": [], "test": []}
    for _, numbers in sorted(groups.items()):
        smaller = min(halves, key=lambda name: sum(sizes[number] for number in halves[name]))
        halves[smaller] += numbers
    if not all(halves.values()):
        raise DataError(
            f"data.eval_part={part}: {len(groups)} held-out texts can't be halved into dev and test; hold out more "
            "(data.held_out), or evaluate on all of it (data.eval_part=all)"
        )
    return sorted(halves[part])


def split_corpus(corpus: Corpus, *, held_out: float = 0.1) -> CorpusSplit:
    """Hold out about `held_out` of the bytes, in whole documents chosen by the hash of their text: no seed, and
    adding a document moves few others. Where no document is small enough (a single file, a few long ones), the end
    of the longest one is held out, cut at a line, and documents that repeat it are dropped; the report says both.
    held_out 0 holds nothing out."""
    if not 0 <= held_out < 1:
        raise UsageError(f"held_out is {held_out}; expected a part of the bytes, at least 0 and below 1")
    if held_out == 0:
        return CorpusSplit(corpus, corpus.documents, ())
    groups = near_copies(corpus.documents, MAX_EXCESS * held_out * corpus.nbytes)
    chosen = _choose_held_out(corpus.documents, groups, held_out)
    parts = _split_documents(corpus, groups, chosen) if chosen else _split_longest_document(corpus, held_out)
    overlap = shingle_overlap(parts.train, parts.val)
    corpus.drop_report.note(
        f"overlap: {overlap:.1%} of the held-out runs of {SHINGLE_WORDS} words are in the training text too"
    )
    return parts


def _split_documents(corpus: Corpus, groups: list[list[int]], chosen: set[int]) -> CorpusSplit:
    copies = [group for group in groups if len(group) > 1]
    if copies:
        number = sum(len(group) for group in copies)
        corpus.drop_report.note(
            f"near-copies: {number} documents in {len(copies)} groups, each kept on one side of the split"
        )
    train = tuple(document for i, document in enumerate(corpus.documents) if i not in chosen)
    val = tuple(document for i, document in enumerate(corpus.documents) if i in chosen)
    return CorpusSplit(corpus, train, val)


def near_copies(documents: Sequence[Document], max_bytes: float = math.inf) -> list[list[int]]:
    """Groups of document indices that are near-copies of one another, directly or through a third; most have one
    member. Two documents are near-copies if NEAR_COPY_OVERLAP of the shorter one's shingles (runs of words) are also in
    the other. A group of more than max_bytes is compared again without the text that many of its documents have in
    common (a header, instructions), so that rows with one beginning are not taken for copies."""
    every = 1 + sum(document.nbytes for document in documents) // MAX_FULL_COMPARISON_BYTES
    runs = [shingle_hashes(document.text, every) for document in documents]
    groups: list[list[int]] = []
    for group in _group_by_overlap(runs):
        if len(group) > COMMON_TEXT_DOCUMENTS and sum(documents[i].nbytes for i in group) > max_bytes:
            within = _group_by_overlap(_without_common_text([runs[i] for i in group]))
            groups += [[group[k] for k in one] for one in within]
        else:
            groups.append(group)
    return groups


def _group_by_overlap(runs: Sequence[np.ndarray]) -> list[list[int]]:
    shared = Counter(pair for numbers in _documents_per_shingle(runs) for pair in _pairs(numbers))
    parents = list(range(len(runs)))
    for (a, b), count in shared.items():
        if count >= NEAR_COPY_OVERLAP * min(len(runs[a]), len(runs[b])):
            parents[_find_root(parents, b)] = _find_root(parents, a)
    groups: dict[int, list[int]] = defaultdict(list)
    for number in range(len(runs)):
        groups[_find_root(parents, number)].append(number)
    return list(groups.values())


def _without_common_text(runs: list[np.ndarray]) -> list[np.ndarray]:
    """The shingles of each document without those of the common text, where enough of its own are left."""
    hashes, counts = np.unique(np.concatenate(runs), return_counts=True)
    common = hashes[counts > COMMON_TEXT_DOCUMENTS]
    own = [run[~_is_in(run, common)] for run in runs]
    return [mine if len(mine) >= MIN_OWN_PART * len(run) else run for mine, run in zip(own, runs, strict=True)]


def shingle_overlap(train: Sequence[Document], val: Sequence[Document]) -> float:
    """The fraction of the held-out shingles that are also in the training documents: how much of the held-out text
    can be known by memory."""
    every = 1 + sum(document.nbytes for document in train) // MAX_FULL_COMPARISON_BYTES
    known = _unique_hashes([shingle_hashes(document.text, every) for document in train])
    hashes = np.concatenate([shingle_hashes(document.text, every) for document in val])
    return float(_is_in(hashes, known).mean()) if len(hashes) else 0.0


def shingle_hashes(text: str, every: int = 1) -> np.ndarray:
    """64-bit hashes of the shingles (runs of SHINGLE_WORDS words) of a text, each once; a sample of them, chosen by
    the hash and so the same in every text."""
    return _unique_hashes([runs[runs % np.uint64(every) == 0] for runs in _iter_run_hashes(text)])


def _unique_hashes(pieces: list[np.ndarray]) -> np.ndarray:
    """numpy's `unique` of all pieces, which are taken out of the list: half of its memory."""
    hashes = np.concatenate(pieces)
    pieces.clear()
    hashes.sort()
    return hashes[np.concatenate([[True], hashes[1:] != hashes[:-1]])] if len(hashes) else hashes


def _iter_run_hashes(text: str) -> Iterator[np.ndarray]:
    """The hash of each run of words, some thousand at once: a text's words never stand in memory together."""
    hashes = (zlib.crc32(match.group().lower().encode()) for match in re.finditer(r"\w+", text))
    words = np.fromiter(islice(hashes, WORDS_AT_ONCE), dtype=np.uint64)
    words = np.pad(words, (0, max(0, SHINGLE_WORDS - len(words))))
    while len(words) >= SHINGLE_WORDS:
        yield _run_hashes(words)
        following = np.fromiter(islice(hashes, WORDS_AT_ONCE), dtype=np.uint64)
        words = np.concatenate([words[1 - SHINGLE_WORDS :], following])


def _run_hashes(words: np.ndarray) -> np.ndarray:
    """A hash of every SHINGLE_WORDS neighbors of `words`, by position."""
    runs = np.zeros(len(words) - SHINGLE_WORDS + 1, dtype=np.uint64)
    for k in range(SHINGLE_WORDS):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + words[k : k + len(runs)]  # modulo 2^64
    return runs ^ (runs >> np.uint64(29))


def _documents_per_shingle(runs: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """For each shingle that is in several documents, their indices."""
    repeated = _shingles_of_several(runs)
    runs = [run[_is_in(run, repeated)] for run in runs]
    hashes = np.concatenate(runs)
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], np.repeat(np.arange(len(runs)), [len(run) for run in runs])[order]
    begins = np.flatnonzero(hashes[1:] != hashes[:-1]) + 1
    return (owners[a:b].tolist() for a, b in pairwise([0, *begins.tolist(), len(hashes)]) if b > a)


def _shingles_of_several(runs: Sequence[np.ndarray]) -> np.ndarray:
    """The hashes that are in more than one of the arrays, sorted."""
    hashes = np.concatenate(runs)
    hashes.sort()
    return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])


def _is_in(hashes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of the hashes are in `known`, which is sorted: numpy's `isin` sorts both again for every document."""
    if not len(known):
        return np.zeros(len(hashes), dtype=bool)
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return known[places] == hashes


def _pairs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """All pairs; only neighbors where a phrase is in many documents (all pairs of a license header are too many)."""
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
        if taken < target and taken + size <= MAX_EXCESS * target:
            chosen.update(group)
            taken += size
    return chosen if taken >= MIN_SHARE * target else set()


def _split_longest_document(corpus: Corpus, held_out: float) -> CorpusSplit:
    """Hold out the end of the longest document, from the beginning of a line (or of a word, or just there). Documents
    that repeat that end are dropped."""
    longest = max(corpus.documents, key=lambda document: document.nbytes)
    place = _place_of_cut(longest.text, held_out * corpus.nbytes / longest.nbytes)
    train, val = longest.text[:place], longest.text[place:]
    if not train.strip() or not val.strip() or len(val.encode()) < MIN_SHARE**2 * held_out * corpus.nbytes:
        raise DataError(
            f"{held_out:.0%} of {corpus.nbytes:,} bytes cannot be held out: the documents are near-copies of one "
            f"another or too long, and the longest, {longest.source}, has {longest.nbytes:,} bytes; add text, or "
            "set data.held_out=0"
        )
    end = Document(val, longest.source, longest.line + train.count("\n"))
    corpus.drop_report.note(
        f"no document is small enough to be held out: the end of {longest.source} is, from line {end.line}"
    )
    kept = replace(longest, text=train)
    others = [document for document in corpus.documents if document is not longest]
    repeated = [document for document in others if shingle_overlap([document], [end]) >= NEAR_COPY_OVERLAP]
    for document in repeated:
        corpus.drop_report.kept = [corpus.drop_report.kept[0] - 1, corpus.drop_report.kept[1] - document.nbytes]
        corpus.drop_report.drop("repeats the held-out text", document.nbytes)
    remaining = [kept if document is longest else document for document in corpus.documents if document not in repeated]
    return CorpusSplit(corpus, tuple(remaining), (end,))


def _place_of_cut(text: str, part: float) -> int:
    """The index after which about `part` of the text, at most half of it, is held out."""
    length = min(round(part * len(text)), len(text) // 2)
    place = len(text) - length
    for mark in ("\n", " "):
        cut = text.find(mark, place, place + max(length // 2, 1))
        if cut >= 0:
            return cut + 1
    return place
