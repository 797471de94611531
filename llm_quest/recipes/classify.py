"""`quest train classify`: texts with labels -> a classifier: a model's head is replaced by one number for each class,
read at a text's last token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_quest.data.by_length import ByLengthFeed, all_of
from llm_quest.data.conversations import held_apart
from llm_quest.data.documents import Ledger
from llm_quest.data.labelled import Labels, as_labels, class_names, labelled
from llm_quest.data.questions import kinds, rows
from llm_quest.errors import UsageError
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.classification import TextClassification
from llm_quest.objectives.last_outputs import last_outputs
from llm_quest.recipes.course import Outcome, company, micro_rows_of
from llm_quest.recipes.tuning import Job, Say, carried_out, edited, opened, require_room
from llm_quest.recipes.tuning_config import Classify
from llm_quest.recipes.yaml import Settings
from llm_quest.techniques.score_head import ScoreHead, score_head
from llm_quest.train.parallel import Parallel
from llm_quest.train.state import derive_seed

BINS = 10


def train_classify(
    config: Classify, settings: Settings, out: Path, *, resume: str = "auto", env: Mapping[str, Any] | None = None,
    quiet: bool = False, say: Say = print,
) -> Outcome:  # fmt: skip
    """Run the recipe in a folder. Every process of a torchrun calls this."""
    with company(config, config.batch.rows) as parallel:
        tell = say if parallel.leader else lambda text: None
        return carried_out(assembled(config, parallel, tell), config, out, resume, env or {}, quiet, tell, parallel)


def assembled(config: Classify, parallel: Parallel, say: Say) -> Job:
    """Model, texts, objective and feed."""
    model, tokenizer = opened(config.model)
    require_room(config.batch.length, model)
    ledger = Ledger()
    part = config.data
    texts = labelled(rows(part.source, kinds)[: part.limit], ledger, text=part.text, label=part.label)
    callbacks = edited(config, model, say)
    names = headed(model, class_names(texts), derive_seed(config.seed, "init"))
    learning(model, config.train)
    train, held = (
        as_labels(s, names, tokenizer, config.batch.length, ledger) for s in held_apart(texts, part.held_out)
    )
    feed = ByLengthFeed(
        train,
        rows=config.batch.rows,
        micro_rows=micro_rows_of(config.batch, parallel, config.batch.length),
        seed=derive_seed(config.seed, "order"),
        share=parallel.share,
    )
    say(f"texts: {len(train):,} to train on, {len(held):,} held out, {len(names)} labels: {', '.join(names[:8])}")
    for note in ledger.notes:
        say(note)
    dropped = {reason: count for reason, (count, _) in sorted(ledger.dropped.items())}
    facts = {"source": part.source, "labels": list(names), "train_rows": len(train), "held_out_rows": len(held)}
    facts |= {"dropped": dropped, "notes": list(ledger.notes), "tokenizer_sha256": tokenizer.hash}
    probe = HeldTexts(held, config.evaluate.every)
    return Job(
        TextClassification(model, smoothing=config.smoothing), feed, lambda run: [probe], tokenizer, facts,
        {"data": train.hash}, callbacks,
    )  # fmt: skip


def headed(model: Decoder, names: tuple[str, ...], seed: int) -> tuple[str, ...]:
    """The names of the classes, in the order of the head's outputs; a head is put on where there is none."""
    head = score_head(model)
    if head is None:
        ScoreHead(len(names), names, seed=seed)(model)
        return names
    if set(names) - set(head.labels):
        raise UsageError(f"the model tells apart {', '.join(head.labels) or 'nothing'}, the texts {', '.join(names)}")
    return head.labels


def learning(model: Decoder, what: str) -> None:
    """Freeze all but the chosen part."""
    parts = {"last_block": [model.blocks[-1], model.norm, model.head], "head": [model.head]}
    if what != "all":
        model.requires_grad_(False)
        for part in parts[what]:
            part.requires_grad_(True)


class HeldTexts:
    """Held-out texts: loss, accuracy, macro F1, calibration error; and what always saying the commonest would reach."""

    name = "eval"

    def __init__(self, held: Labels, every: int, at_once: int = 32):
        self.held, self.every, self.at_once = held, every, at_once

    @torch.no_grad()
    def measure(self, model: Decoder, step: int) -> Mapping[str, float]:
        device = next(model.parameters()).device
        found, labels = [], []
        for numbers in all_of(self.held, self.at_once):
            batch = self.held.batch(numbers).to(device)
            out = last_outputs(model, batch.tokens, batch.positions)
            found.append(out.double().softmax(dim=1).cpu().numpy())
            labels.append(batch.labels.cpu().numpy())
        return measures(np.concatenate(found), np.concatenate(labels))


def measures(p: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """From probabilities (N, classes) and class numbers (N,)."""
    said, classes = p.argmax(axis=1), p.shape[1]
    right = said == labels
    return {
        "loss": float(-np.log(np.maximum(p[np.arange(len(labels)), labels], 1e-300)).mean()),
        "accuracy": float(right.mean()),
        "macro_f1": float(np.mean([f1(said == c, labels == c) for c in range(classes) if (labels == c).any()])),
        "calibration_error": calibration_error(p.max(axis=1), right),
        "commonest": float(np.bincount(labels).max() / len(labels)),
    }


def f1(said: np.ndarray, true: np.ndarray) -> float:
    """Harmonic mean of precision and recall of one class; 0 where it was never rightly said."""
    both = float((said & true).sum())
    return 2 * both / float(said.sum() + true.sum()) if both else 0.0


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599): |accuracy - confidence| by bins of equal width,
    weighed by how many fall in each."""
    where = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps: Sequence[float] = [
        abs(float(right[where == b].mean() - confidence[where == b].mean())) * float((where == b).mean())
        for b in np.unique(where)
    ]
    return float(sum(gaps))
