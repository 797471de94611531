"""Entropy-1, and that whoever asks about a position has not shown it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from llm_quest.errors import UsageError
from llm_quest.models.build import build
from llm_quest.recipes.rpt.positions import (
    entropy_bucket,
    length_grouped_documents,
    select_positions,
    subsample_positions,
    top_entropy,
)
from llm_quest.recipes.rpt.prompts import Position


def H(p: list[float], **options: bool) -> float:
    return float(top_entropy(torch.tensor(p, dtype=torch.float64).log(), **options))


def test_vector_entropy_1():
    assert H([0.5, 0.25, 0.125, 0.125]) == pytest.approx(1.213008, abs=1e-6)
    assert H([1 / 16] * 16) == pytest.approx(2.772589, abs=1e-6)
    tail = [0.6, 0.2, 0.1, *[0.005] * 20]
    assert H(tail, renormalize=False) == pytest.approx(1.203032, abs=1e-6)
    assert H(tail) == pytest.approx(1.211038, abs=1e-6)
    assert float(top_entropy(torch.tensor(tail, dtype=torch.float64).log(), 23)) == pytest.approx(1.388473, abs=1e-6)


def test_certainty_is_zero_and_not_nan():
    assert H([1.0, 0.0, 0.0]) == 0
    assert H([1.0, *[0.0] * 30], renormalize=False) == 0


def test_a_position_is_judged_by_what_stands_before_it():
    model = build("llama3.2-tiny", seed=3)
    ids = [5, 9, 2, 7, 1]
    found = select_positions(model, [[4], ids], min_entropy=-1.0)
    assert [(p.document, p.place) for p in found] == [(1, 1), (1, 2), (1, 3), (1, 4)]
    other = select_positions(model, [[4], [*ids[:3], 8, 1]], min_entropy=-1.0)
    assert [p.entropy for p in found[:3]] == pytest.approx([p.entropy for p in other[:3]], abs=1e-6)
    assert found[3].entropy != pytest.approx(other[3].entropy, abs=1e-6), "place 4 reads token 3"
    alone = model(torch.tensor([ids[:2]]))[0, -1]
    assert found[1].entropy == pytest.approx(top_entropy(alone).item(), abs=1e-5)
    assert select_positions(model, [ids], min_entropy=math.log(16) + 1e-3) == []
    assert select_positions(model, [[1] * (model.config.max_position_embeddings + 1)], min_entropy=-1.0), (
        "the last token is only foretold"
    )
    with pytest.raises(UsageError, match="the proxy sees"):
        select_positions(model, [[1] * (model.config.max_position_embeddings + 2)])


def test_buckets_are_disjoint():
    assert [entropy_bucket(h) for h in (0.5, 0.51, 1.0, 1.2, 1.5, 2.0)] == [0, 1, 1, 2, 2, 3]


def test_documents_of_all_lengths_are_read_together_as_each_alone():
    """Padding on the right moves no entropy, and the places come in the documents' order."""
    model = build("llama3.2-tiny", seed=3)
    documents = [[(7 * n + 3 * k) % 90 for k in range(n)] for n in (3, 40, 1, 17, 2, 9)]
    together = select_positions(model, documents, min_entropy=-1.0)
    alone = [
        replace(p, document=n)
        for n, ids in enumerate(documents)
        for p in select_positions(model, [ids], min_entropy=-1.0)
    ]
    assert [(p.document, p.place) for p in together] == [(p.document, p.place) for p in alone]
    assert [p.entropy for p in together] == pytest.approx([p.entropy for p in alone], abs=1e-5)
    assert list(length_grouped_documents(documents, 64)) == [[1, 3, 5, 0, 4]]
    assert [len(some) for some in length_grouped_documents([[1] * 1000] * 9, 1000)] == [4, 4, 1]


def test_thinning_is_even_and_the_seed_decides():
    found = [Position(n, 1, 1.0) for n in range(100)]
    some = subsample_positions(found, 10, 1)
    assert len(some) == 10
    assert some == sorted(some, key=lambda one: one.document) == subsample_positions(found, 10, 1)
    assert some != subsample_positions(found, 10, 2)
    assert subsample_positions(found[:3], 10, 1) == found[:3]
