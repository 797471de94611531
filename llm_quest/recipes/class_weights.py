"""Class weights of a classifier's loss (`class_weights=balanced`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from llm_quest.contracts import LogFn
from llm_quest.errors import UsageError
from llm_quest.recipes.schema import did_you_mean

Weight = Annotated[float, Field(gt=0)]
ClassWeights = Annotated[
    Literal["balanced"] | dict[str, Weight] | tuple[Weight, ...] | None,
    Field(
        description="balanced: rare classes count more; or numbers, one for each class in order, or by name (others: "
        "1); null: all alike"
    ),
]


def make_class_weights(
    choice: ClassWeights,
    names: Sequence[str],
    counts: Sequence[int],
    rows: int,
    log: LogFn,
    *,
    multi_label: bool = False,
) -> Tensor | None:
    """The weight of each class (C,). names, counts: of the classes in the training rows. UsageError for weights that do
    not fit the classes.

    balanced: rows / (classes x count), as scikit-learn has it, so that every class has the same sum of weights; of
    several labels negatives / positives, as the docs of torch.nn.BCEWithLogitsLoss advise for pos_weight. A class
    without rows: 1."""
    if choice is None:
        return None
    if choice == "balanced":
        weights = balance_weights(counts, rows, multi_label)
    elif isinstance(choice, Mapping):
        for name in choice:
            if name not in names:
                near = did_you_mean(name, list(names))
                raise UsageError(f"class_weights: there is no class {name!r}{near}; there are {', '.join(names)}")
        weights = [choice.get(name, 1.0) for name in names]
    else:
        weights = list(choice)
    if len(weights) != len(names):
        raise UsageError(
            f"class_weights has {len(weights)} numbers for {len(names)} classes; give one for each: {', '.join(names)}"
        )
    log(f"class weights: {', '.join(f'{n} {w:.4g}' for n, w in list(zip(names, weights, strict=True))[:8])}")
    return torch.tensor(weights)


def balance_weights(counts: Sequence[int], rows: int, multi_label: bool) -> list[float]:
    """Balanced weights, as `make_class_weights` defines them."""
    if multi_label:
        return [max(1, rows - count) / count if count else 1.0 for count in counts]
    used = sum(count > 0 for count in counts)
    return [rows / (used * count) if count else 1.0 for count in counts]
