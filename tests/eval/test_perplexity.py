"""Evaluation: bits per byte as the definition has them, document by document."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llm_quest.data.document import Document
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import DataError, UsageError
from llm_quest.eval.perplexity import (
    evaluate_baselines,
    evaluate_documents,
    evaluate_perplexity,
    make_eval_batches,
    ratio_interval,
    tokenize_documents,
)
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models.build import build
from llm_quest.models.llama import Config

TEXTS = [
    "the cat sat on the mat. ",
    "a dog éats the cat's mat and sat. ",
    "mats and cats and dogs and hats. ",
    "the end.",
]
DOCUMENTS = [Document(text * repeats, "test") for text, repeats in zip(TEXTS, (9, 3, 5, 1), strict=True)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS * 3, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = Config(
        tokenizer.vocab_size, 32, 2, 4, 2, 8, 64, 512, RotaryEmbedding(8, 10_000.0), tie_word_embeddings=True
    )
    return build(config, seed=1)


def by_hand(model, tokenizer, document) -> float:
    """-ln p of every token and of the end, in one pass over the document alone."""
    ids = torch.tensor([[tokenizer.start_token_id, *tokenizer.encode(document.text), tokenizer.eos_token_ids[0]]])
    with torch.no_grad():
        return float(F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum"))


def test_bits_per_byte_follow_the_definition(model, tokenizer):
    found = evaluate_documents(model, tokenizer, DOCUMENTS)
    nats = sum(by_hand(model, tokenizer, document) for document in DOCUMENTS)
    nbytes = sum(len(document.text.encode()) for document in DOCUMENTS)
    assert found.bytes == nbytes
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / nbytes, rel=1e-6)
    assert found.loss == pytest.approx(nats / found.tokens, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_how_documents_are_laid_in_rows_does_not_matter(model, tokenizer):
    long = evaluate_perplexity(model, make_eval_batches(model, tokenize_documents(tokenizer, DOCUMENTS), length=512))
    short = evaluate_perplexity(model, make_eval_batches(model, tokenize_documents(tokenizer, DOCUMENTS), length=300))
    assert long.bits_per_byte == pytest.approx(short.bits_per_byte, rel=1e-6)
    assert long.interval == pytest.approx(short.interval, rel=1e-5)


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    evaluate_perplexity(model, make_eval_batches(model, tokenize_documents(tokenizer, DOCUMENTS)))
    assert model.training
    model.eval()


def test_baselines_read_the_training_text_or_nothing(model, tokenizer):
    alone = evaluate_documents(model, tokenizer, DOCUMENTS)
    assert all(name.endswith("without training text") for name in alone.baselines)
    beside = evaluate_baselines(DOCUMENTS[:3], DOCUMENTS[3:], tokenizer)
    assert "Kneser-Ney 5-gram, bytes" in beside
    assert beside["Kneser-Ney 5-gram, bytes"] < beside["unigram, bytes"]


def test_a_limit_looks_at_whole_documents_and_the_baselines_at_the_same(model, tokenizer):
    few = evaluate_documents(model, tokenizer, DOCUMENTS, max_tokens=1)
    assert few.documents == 1
    assert few.bytes in {document.nbytes for document in DOCUMENTS}
    assert few.interval is None
    (first,) = [d for d in DOCUMENTS if d.nbytes == few.bytes]
    assert few.baselines == evaluate_baselines((), [first], tokenizer)


def test_the_interval_is_cochrans():
    bits, nbytes = np.array([10.0, 30.0, 26.0]), np.array([10, 20, 30])
    ratio = 66 / 60
    spread = math.sqrt(3 / 2 * ((10 - 11) ** 2 + (30 - 22) ** 2 + (26 - 33) ** 2)) / 60
    assert ratio_interval(bits, nbytes) == pytest.approx((ratio - 1.96 * spread, ratio + 1.96 * spread))
    assert ratio_interval(bits[:1], nbytes[:1]) is None


def test_nineteen_of_twenty_intervals_hold_the_truth():
    generator, held = np.random.default_rng(0), 0
    for _ in range(400):
        nbytes = generator.integers(50, 500, size=40)
        low, high = ratio_interval(nbytes * generator.normal(2.0, 0.5, size=40), nbytes)
        held += low < 2.0 < high
    assert 0.90 < held / 400 < 0.98


def test_the_finding_is_json_and_lines(model, tokenizer):
    found = evaluate_documents(model, tokenizer, DOCUMENTS, source="four documents")
    json.dumps(found.as_json())
    text = "\n".join(found.lines())
    assert "four documents: 4 documents" in text
    assert "xz -9e, without training text" in text


def test_what_cannot_be_evaluated_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="holds no document"):
        evaluate_documents(model, tokenizer, [])
    with pytest.raises(UsageError, match="longer than the model's context of 512"):
        evaluate_documents(model, tokenizer, DOCUMENTS, length=513)
    small = build(Config(50, 32, 1, 4, 2, 8, 64, 512, RotaryEmbedding(8, 10_000.0), tie_word_embeddings=True))
    with pytest.raises(UsageError, match="load the tokenizer that the model was trained with"):
        evaluate_documents(small, tokenizer, DOCUMENTS)
