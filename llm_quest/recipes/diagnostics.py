"""Symptoms of supervised runs that fail while they look healthy, each with its remedy: overfitting, a classifier or a
reward model at chance, skipped steps.

`rollouts/diagnostics.py` has those of reinforcement learning, and reports each once until it is gone;
`train/divergence.py` finds a loss that rises."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from llm_quest.rollouts.diagnostics import MetricsRow, Symptom, metric_value

WINDOW = 3
"""Rows whose mean stands for one number."""
EVALUATIONS = 3
"""Evaluations in a row that show a symptom before it is reported."""
OVERFIT_RISE = 0.01
SKIPPED_FRACTION = 0.01
CHANCE_MARGIN = 0.02


def main_loss(row: MetricsRow) -> float:
    """The next-token loss of a row, without auxiliary terms; the loss where there is none."""
    return metric_value(row, "next_token", metric_value(row, "loss"))


def last_evaluations(rows: Sequence[MetricsRow], name: str, number: int) -> list[float]:
    """The newest values of a held-out number; empty where the newest row has none, or there are fewer."""
    if name not in rows[-1]:
        return []
    values = [metric_value(row, name) for row in rows if name in row]
    return values[-number:] if len(values) >= number else []


def is_overfitting(rows: Sequence[MetricsRow]) -> bool:
    """Held-out loss has risen for EVALUATIONS evaluations, and training loss has not."""
    held_out_losses = last_evaluations(rows, "eval/loss", EVALUATIONS + 1)
    if not held_out_losses or not all(later > before for before, later in itertools.pairwise(held_out_losses)):
        return False
    since = [row for row in rows if "eval/loss" in row][-EVALUATIONS - 1]
    return held_out_losses[-1] > held_out_losses[0] * (1 + OVERFIT_RISE) and main_loss(rows[-1]) <= main_loss(since)


def pairs_at_chance(rows: Sequence[MetricsRow]) -> bool:
    """Half of the held-out pairs are right, within the 95 % interval of each evaluation."""
    accuracy = last_evaluations(rows, "eval/accuracy", EVALUATIONS)
    around = last_evaluations(rows, "eval/interval", EVALUATIONS)
    return bool(accuracy) and bool(around) and all(a - i <= 0.5 for a, i in zip(accuracy, around, strict=True))


def classes_at_chance(rows: Sequence[MetricsRow]) -> bool:
    """Accuracy is that of always predicting the most common class."""
    accuracy = last_evaluations(rows, "eval/accuracy", EVALUATIONS)
    commonest = last_evaluations(rows, "eval/commonest", EVALUATIONS)
    return bool(commonest) and all(a <= c + CHANCE_MARGIN for a, c in zip(accuracy, commonest, strict=True))


def has_skipped_steps(rows: Sequence[MetricsRow]) -> bool:
    skipped = metric_value(rows[-1], "skipped_steps", 0.0)
    return skipped >= 2 and skipped > SKIPPED_FRACTION * rows[-1]["step"]


SUPERVISED_SYMPTOMS: tuple[Symptom, ...] = (
    Symptom(
        "overfitting",
        is_overfitting,
        lambda row: (
            f"held-out loss has risen for {EVALUATIONS} evaluations (now {metric_value(row, 'eval/loss'):.3f}) while "
            "training loss fell: keep the best checkpoint (metric_for_best_model=eval/loss), lower max_steps or "
            "learning_rate, or add data"
        ),
    ),
    Symptom(
        "pairs at chance",
        pairs_at_chance,
        lambda row: (
            f"held-out accuracy {metric_value(row, 'eval/accuracy'):.1%} is what guessing gets: raise max_steps or "
            "learning_rate, or read the pairs; swapped labels look the same"
        ),
    ),
    Symptom(
        "classes at chance",
        classes_at_chance,
        lambda row: (
            f"held-out accuracy {metric_value(row, 'eval/accuracy'):.1%} is that of always predicting the commonest "
            f"class ({metric_value(row, 'eval/commonest'):.1%}): raise max_steps or learning_rate, or read the labels"
        ),
    ),
    Symptom(
        "skipped steps",
        has_skipped_steps,
        lambda row: (
            f"{metric_value(row, 'skipped_steps'):.0f} of {row['step']} updates were left out, because their numbers "
            "were not finite: lower learning_rate, or set precision=fp32"
        ),
    ),
)
