"""Baselines: distributions that sum to one, one of them worked out by hand, and an order of strength that must hold."""

from __future__ import annotations

import lzma
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quest.data.document import Document
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import DataError
from llm_quest.eval.baselines import (
    KneserNey,
    byte_sequences,
    compressor_bits_per_byte,
    compute_baselines,
    kneser_ney_discounts,
)

SEQUENCES = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=6)


@given(SEQUENCES, st.integers(1, 5), st.lists(st.integers(0, 4), max_size=6))
def test_probabilities_sum_to_one_in_every_context(sequences: list[list[int]], order: int, context: list[int]):
    model = KneserNey.fit([np.array(s) for s in sequences], 5, order)
    p = model.next_symbol_probs(context)
    assert p.sum() == pytest.approx(1)
    assert (p > 0).all()


@given(SEQUENCES, st.integers(1, 5))
def test_nats_are_the_chain_of_distributions(sequences: list[list[int]], order: int):
    model = KneserNey.fit([np.array(s) for s in sequences[:1]], 5, order)
    chain = -sum(math.log(model.next_symbol_probs(s[:t])[s[t]]) for s in sequences for t in range(len(s)))
    assert model.negative_log_likelihood([np.array(s) for s in sequences]) == pytest.approx(chain)


def test_a_bigram_model_on_the_blackboard():
    """Symbols a=0, b=1, end=2; training text "a b a b" and its end. All discounts are 0.75 (no counts of counts to go
    by).

    bigrams   sa 1   ab 2   ba 1   b. 1                      s: the start
    before    a: {s, b} = 2    b: {a} = 1    end: {b} = 1    sum 4, three kinds
    p(w)      (n(w) - .75)/4 + 3*.75/4 * 1/3                 a .3125+.1875   b .0625+.1875   end .0625+.1875
    p(w | b)  (c(bw) - .75)/2 + 2*.75/2 * p(w)               a .125+.75*.5   b .75*.25       end .125+.75*.25
    p(w | a)  (2 - .75)/2 for b, + .75/2 * p(w)
    """
    model = KneserNey.fit([np.array([0, 1, 0, 1, 2])], 3, 2)
    assert model.next_symbol_probs([1]) == pytest.approx([0.5, 0.1875, 0.3125])
    assert model.next_symbol_probs([0]) == pytest.approx([0.1875, 0.625 + 0.09375, 0.09375])
    assert model.next_symbol_probs([]) == pytest.approx([0.25 + 0.75 * 0.5, 0.75 * 0.25, 0.75 * 0.25])
    assert model.next_symbol_probs([2]) == pytest.approx([0.5, 0.25, 0.25])  # never seen: the shorter context


def test_a_word_that_follows_one_word_only_is_rare_elsewhere():
    """ "San Francisco" nine times, and as many other pairs: Francisco (1) was seen most, after one word (0) only."""
    text = [0, 1] * 9 + [2, 3, 4, 3, 5, 3, 6, 3]
    model = KneserNey.fit([np.array(text)], 8, 2)
    unseen = model.next_symbol_probs([7])
    assert unseen[1] < unseen[3]


def test_modified_discounts_follow_the_counts_of_counts():
    counts = np.repeat([1, 2, 3, 4, 9], [40, 20, 10, 5, 3])
    y = 40 / 80
    assert kneser_ney_discounts(counts) == pytest.approx(
        [0, 1 - 2 * y * 20 / 40, 2 - 3 * y * 10 / 20, 3 - 4 * y * 5 / 10]
    )
    assert kneser_ney_discounts(np.array([1, 1, 2])).tolist() == [0, 0.75, 0.75, 0.75]


def test_bytes_end_with_an_end():
    assert [s.tolist() for s in byte_sequences([Document("aé", "x")])] == [[97, 0xC3, 0xA9, 256]]


def test_a_compressor_pays_little_for_what_it_has_read():
    noise = Document(random.Random(0).randbytes(2000).hex(), "x")
    seen = compressor_bits_per_byte([noise], [noise], lzma.compress)
    assert 8 * len(lzma.compress(noise.text.encode())) / noise.nbytes > 3.9
    assert seen < 0.1


def test_the_table_has_every_baseline_and_longer_contexts_win():
    sentences = [f"the {a} {b} {c} the {a}. " for a in ("red", "old") for b in ("cat", "dog") for c in ("saw", "met")]
    texts = ["".join(random.Random(i).choices(sentences, k=40)) for i in range(20)]
    documents = [Document(text, f"doc{i}") for i, text in enumerate(texts)]
    tokenizer = train_bpe(texts, 300)
    table = {
        row.name: row.bits_per_byte for row in compute_baselines(documents[:16], documents[16:], tokenizer=tokenizer)
    }
    assert list(table) == [
        "unigram, bytes",
        "Kneser-Ney 5-gram, bytes",
        "unigram, tokens",
        "Kneser-Ney 5-gram, tokens",
        "zlib -9",
        "bz2 -9",
        "xz -9e",
    ]
    assert table["Kneser-Ney 5-gram, bytes"] < 0.5 * table["unigram, bytes"]
    assert table["Kneser-Ney 5-gram, tokens"] < table["unigram, tokens"]
    entropy = 40 * 3 / np.mean([len(text) for text in texts])  # three free choices of two in a sentence
    assert min(table.values()) > entropy


def test_nothing_held_out_is_named():
    with pytest.raises(DataError, match="training and held-out documents"):
        compute_baselines([Document("a", "x")], [])
