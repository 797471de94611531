"""The split: whole documents, near-copies together, the same for the same texts."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from llm_quest.data.corpus import Corpus
from llm_quest.data.document import Document, DropReport
from llm_quest.data.split import WORDS_AT_ONCE, near_copies, shingle_hashes, shingle_overlap, split_corpus
from llm_quest.errors import DataError, UsageError

WORDS = [f"word{i}" for i in range(2000)]


def prose(seed: int, words: int = 120) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + "\n"


def corpus_of(*texts: str) -> Corpus:
    return Corpus("test", tuple(Document(text, f"doc{i}") for i, text in enumerate(texts)), DropReport(), "0" * 64)


def test_every_document_is_on_one_side_and_the_part_is_about_right():
    corpus = corpus_of(*map(prose, range(100)))
    parts = split_corpus(corpus, held_out=0.2)
    assert set(parts.train) | set(parts.val) == set(corpus.documents)
    assert not set(parts.train) & set(parts.val)
    assert 0.15 < sum(d.nbytes for d in parts.val) / corpus.nbytes < 0.25


def test_the_split_looks_at_texts_not_at_their_order_and_moves_few_when_one_is_added():
    texts = [prose(i) for i in range(100)]
    held = {d.text for d in split_corpus(corpus_of(*texts)).val}
    assert held == {d.text for d in split_corpus(corpus_of(*reversed(texts))).val}
    assert len(held ^ {d.text for d in split_corpus(corpus_of(*texts, prose(1000))).val}) <= 2


def test_near_copies_are_found_and_strangers_are_not():
    body, long = prose(0), prose(1, 3000)
    header = "licensed under the same words as everything else here you may copy it as you please\n"
    corpus = corpus_of(
        body, header + body, prose(2), long, prose(3) + long, header + prose(4, 300), header + prose(5, 300)
    )
    assert near_copies(corpus.documents) == [[0, 1], [2], [3, 4], [5], [6]]


def test_a_short_text_inside_a_long_one_is_its_near_copy():
    assert near_copies(corpus_of(prose(0, 3000) + prose(1, 20) + prose(2, 3000), prose(1, 20)).documents) == [[0, 1]]


def test_overlap_is_the_part_that_is_known_by_heart():
    train, val = corpus_of(prose(0, 107)).documents, corpus_of(prose(0, 57) + prose(1, 50)).documents
    assert shingle_overlap(train, train) == 1
    assert shingle_overlap(train, val) == 0.5  # 50 of its 100 runs of eight words
    assert shingle_overlap(train, corpus_of(prose(2)).documents) == 0


def test_a_large_family_stays_together():
    family = [prose(0) + f"variant {i}" for i in range(60)]
    assert sorted(map(len, near_copies(corpus_of(*family, *map(prose, range(1, 20))).documents)))[-1] == 60


def test_near_copies_lie_on_one_side():
    corpus = corpus_of(*(text for i in range(60) for text in (prose(i), "# another license\n" + prose(i))))
    parts = split_corpus(corpus)
    held = {d.source for d in parts.val}
    assert held
    assert all((f"doc{2 * i}" in held) == (f"doc{2 * i + 1}" in held) for i in range(60))
    assert corpus.drop_report.notes == [
        "near-copies: 120 documents in 60 groups, each kept on one side of the split",
        "overlap: 0.0% of the held-out runs of 8 words are in the training text too",
    ]


def test_a_single_document_is_cut_at_a_line():
    text = "".join(prose(i, 10) for i in range(50))
    parts = split_corpus(corpus := corpus_of(text))
    [train], [val] = parts.train, parts.val
    assert train.text + val.text == text
    assert train.text.endswith("\n")
    assert val.line == 1 + train.text.count("\n")
    assert 0.05 < val.nbytes / corpus.nbytes <= 0.1
    assert corpus.drop_report.notes == [
        f"no document is small enough to be held out: the end of doc0 is, from line {val.line}",
        "overlap: 0.0% of the held-out runs of 8 words are in the training text too",
    ]


def test_few_long_documents_lose_the_end_of_the_longest():
    corpus = corpus_of(prose(0, 100), prose(1, 200))
    parts = split_corpus(corpus)
    assert [d.source for d in parts.train] == ["doc0", "doc1"]
    assert [d.source for d in parts.val] == ["doc1"]


def test_holding_nothing_out_and_mistakes():
    corpus = corpus_of(prose(0))
    assert split_corpus(corpus, held_out=0).train == corpus.documents
    with pytest.raises(UsageError, match="held_out is 1"):
        split_corpus(corpus, held_out=1)
    with pytest.raises(DataError, match=r"10% of 1 bytes cannot be held out: .* set data.held_out=0"):
        split_corpus(corpus_of("a"))


def test_a_copy_of_the_text_that_is_held_out_is_not_trained_on():
    longest = prose(0, 3000)
    corpus = corpus_of(prose(2, 2000), longest, "another header\n" + prose(0, 3000)[:-20], prose(3, 2000))
    parts = split_corpus(corpus)
    [val] = parts.val
    assert shingle_overlap(parts.train, parts.val) < 0.02
    assert longest.endswith(val.text) or corpus.documents[2].text.endswith(val.text)
    assert len(parts.train) == 3
    assert corpus.drop_report.dropped["repeats the held-out text"][0] == 1


def test_rows_with_one_beginning_are_no_copies_of_one_another():
    """Rows of a chat or a table begin with the same instructions, which may be more than half of each."""
    head = prose(0, 60)
    rows = [head + prose(i, random.Random(i).randint(30, 45)) for i in range(1, 300)]
    corpus = corpus_of(*rows)
    parts = split_corpus(corpus, held_out=0.05)
    assert 0.025 <= sum(d.nbytes for d in parts.val) / corpus.nbytes <= 0.0625
    assert {d.text for d in parts.val} <= set(rows)


def test_a_large_family_that_cannot_be_held_out_is_refused():
    rows = [prose(0) + f"variant {i}" for i in range(300)]
    with pytest.raises(DataError, match=r"5% of .* bytes cannot be held out: the documents are near-copies"):
        split_corpus(corpus_of(*rows), held_out=0.05)


def test_splitting_takes_memory_in_proportion_to_a_few_times_the_text():
    text = "\n".join(prose(i, 10).strip() for i in range(20_000))
    corpus = corpus_of(text)
    tracemalloc.start()
    try:
        split_corpus(corpus, held_out=0.05)
        assert tracemalloc.get_traced_memory()[1] < 5 * corpus.nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("words", [1, 7, 8, 9, WORDS_AT_ONCE - 1, WORDS_AT_ONCE, WORDS_AT_ONCE + 1, WORDS_AT_ONCE + 8])
def test_runs_of_words_are_the_same_however_many_are_read_at_once(words, monkeypatch):
    text = prose(1, words)
    expected = shingle_hashes(text)
    monkeypatch.setattr("llm_quest.data.split.WORDS_AT_ONCE", 1 << 20)
    assert shingle_hashes(text).tolist() == expected.tolist()
    assert len(expected) == max(1, words - 7)
