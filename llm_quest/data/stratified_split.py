"""Stratified held-out split: each label has about the same share on both sides, and equal items are on one side.

Items have one label or several. The rarest label is divided first, as in iterative stratification (Sechidis et al.
2011, "On the Stratification of Multi-Label Data", algorithm 1), for an item that is common in everything else can still
be placed later. Within a label the items are taken in the order of their content's hash: no seed can choose easy ones,
and a new item moves few others.

Commonly got wrong: a share of all items drawn at random, in which a rare label is held out whole, or not at all."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from llm_quest.errors import DataError, UsageError

NO_LABEL = ""
"""Stands for an item without labels."""


def choose_held_out(keys: Sequence[str], labels: Sequence[Sequence[str]], held_out: float) -> list[int]:
    """The indices of the items to hold out, about `held_out` of each label's. keys: hashes of content; items of equal
    key stay together. labels: of each item. DataError where nothing can be held out.

    A label whose items are all equal is never held out; one with few items may not be either."""
    if not 0 < held_out < 1:
        raise UsageError(f"held_out is {held_out}; expected a part of the items, above 0 and below 1")
    groups: dict[str, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        groups[key].append(number)
    counts = {key: count_labels(labels, groups[key]) for key in sorted(groups)}
    chosen = choose_groups(counts, held_out)
    if not chosen:
        raise DataError(
            f"{len(keys)} rows, {len(groups)} of them different: no label has two, of which one could be held out; add "
            "rows, or set data.stratify=false"
        )
    return sorted(number for key in chosen for number in groups[key])


def count_labels(labels: Sequence[Sequence[str]], numbers: Sequence[int]) -> Counter[str]:
    return Counter(label for number in numbers for label in labels[number] or (NO_LABEL,))


def choose_groups(counts: dict[str, Counter[str]], held_out: float) -> set[str]:
    """The keys to hold out. counts: of each key, how many of its items have each label; in the order of the keys."""
    holders: dict[str, list[str]] = defaultdict(list)
    for key, label_counts in counts.items():
        for label in label_counts:
            holders[label].append(key)
    quotas = divide_quotas({label: sum(counts[k][label] for k in keys) for label, keys in holders.items()
                            if len(keys) > 1}, held_out)  # fmt: skip
    remaining = {label: len(keys) for label, keys in holders.items()}
    chosen, taken, undecided = set[str](), Counter[str](), set(counts)
    while undecided:
        rarest = min((label for label, left in remaining.items() if left), key=lambda label: (remaining[label], label))
        for key in [key for key in holders[rarest] if key in undecided]:
            if taken[rarest] + counts[key][rarest] <= quotas.get(rarest, 0):
                chosen.add(key)
                taken.update(counts[key])
            undecided.discard(key)
            for label in counts[key]:
                remaining[label] -= 1
    whole = [key for key, label_counts in counts.items() if quotas.keys() & label_counts]
    return chosen or set(sorted(whole, key=lambda key: counts[key].total())[:1])


def divide_quotas(totals: dict[str, int], held_out: float) -> dict[str, int]:
    """How many items of each label to hold out: its share rounded, so that the sum is the share of all (largest
    remainders), at least one in all and never all of a label."""
    shares = {label: held_out * total for label, total in totals.items()}
    quotas = {label: min(math.floor(share), totals[label] - 1) for label, share in shares.items()}
    rest = max(1, round(sum(shares.values()))) - sum(quotas.values())
    by_remainder = sorted(shares, key=lambda label: (math.floor(shares[label]) - shares[label], label))
    for label in by_remainder[: max(0, rest)]:
        quotas[label] = min(quotas[label] + 1, totals[label] - 1)
    return quotas
