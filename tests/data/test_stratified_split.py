from __future__ import annotations

import hashlib
import random
from collections import Counter

import pytest

from llm_quest.data.stratified_split import choose_held_out, divide_quotas
from llm_quest.errors import DataError


def keys_of(contents: list[str]) -> list[str]:
    return [hashlib.sha256(one.encode()).hexdigest() for one in contents]


def test_quotas_are_shares_whose_sum_is_the_share_of_all():
    assert divide_quotas({"a": 80, "b": 15, "c": 5}, 0.1) == {"a": 8, "b": 2, "c": 0}
    assert divide_quotas({"a": 4, "b": 4, "c": 4}, 0.25) == {"a": 1, "b": 1, "c": 1}
    assert divide_quotas({"a": 2, "b": 2}, 0.01) == {"a": 1, "b": 0}


@pytest.mark.parametrize("held_out", [0.05, 0.1, 0.3, 0.49])
@pytest.mark.parametrize("shape", ["balanced", "skewed", "many"])
def test_each_label_is_held_out_by_its_share_to_one_item(shape: str, held_out: float):
    weights = {"balanced": [1, 1, 1], "skewed": [90, 9, 1], "many": [1] * 30}[shape]
    labels = [(str(one),) for one in random.Random(0).choices(range(len(weights)), weights, k=400)]
    chosen = choose_held_out(keys_of([str(n) for n in range(400)]), labels, held_out)
    assert len(chosen) == round(held_out * 400)
    whole, held = Counter(label for (label,) in labels), Counter(labels[n][0] for n in chosen)
    assert all(abs(held[label] - held_out * count) < 1 for label, count in whole.items())


def test_equal_items_stay_together_and_the_order_of_rows_changes_nothing():
    contents = [str(n // 2) for n in range(200)]
    labels = [("a" if n // 2 % 3 else "b",) for n in range(200)]
    chosen = choose_held_out(keys_of(contents), labels, 0.2)
    held = {contents[n] for n in chosen}
    assert len(chosen) == 2 * len(held)
    back = choose_held_out(keys_of(contents[::-1]), labels[::-1], 0.2)
    assert {contents[::-1][n] for n in back} == held
    more = choose_held_out(keys_of([*contents, "new"]), [*labels, ("a",)], 0.2)
    assert len({[*contents, "new"][n] for n in more} ^ held) <= 2


def test_of_several_labels_the_rarest_are_divided_first():
    """x is common, and every item with w has it too: w still gets its share."""
    chance = random.Random(1)
    labels = [("x", "w") if n % 40 == 0 else ("x",) if chance.random() < 0.7 else () for n in range(400)]
    chosen = choose_held_out(keys_of([str(n) for n in range(400)]), labels, 0.2)
    held = Counter(label for n in chosen for label in labels[n] or ("none",))
    whole = Counter(label for one in labels for label in one or ("none",))
    assert held["w"] == 2
    assert all(abs(held[label] - 0.2 * count) <= 1 for label, count in whole.items())


def test_a_single_label_of_few_contents_holds_one_out_or_says_so():
    assert len(choose_held_out(keys_of(["a", "a", "a", "b", "b", "b"]), [("x",)] * 6, 0.1)) == 3
    with pytest.raises(DataError, match="6 rows, 1 of them different: no label has two"):
        choose_held_out(keys_of(["a"] * 6), [("x",)] * 6, 0.1)
